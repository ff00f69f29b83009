import dataclasses
import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastvid import results
from fastvid.errors import InputError
from fastvid.results import Evaluation, RunResult

RESULT = RunResult(
    dataset="digits",
    method="vid",
    percent=5.0,
    per_class=7,
    seed=1,
    accuracy=61.2,
    best_accuracy=63.0,
    evaluated_on="test",
    train_images=70,
    steps=120,
    seconds=3.25,
    images_per_second=861.5,
    group=["student", "vid"],
    history=[
        Evaluation(1, 40.0, 2.25, 33.5, {"stem": [4.8, 4.9, 5.0]}),
        Evaluation(2, 61.2, 1.5, 30.25, {"stem": [4.1, 4.2, 4.3]}),
    ],
    weights="vid-7-seed1.safetensors",
    weights_sha256="ab" * 32,
    data_sha256="da" * 32,
    teacher_sha256="cd" * 32,
    teacher_accuracy=97.0,
    config={"method": ["vid"], "vid": {"weight": None}},
    environment={"torch": "2.15.0"},
)
OTHER = dataclasses.replace(
    RESULT, method="student", teacher_sha256=None, teacher_accuracy=None, per_class=None
)


def test_results_come_back_equal_and_in_order(tmp_path):
    for result in (RESULT, OTHER):
        results.append(tmp_path, result)
    assert results.read(tmp_path) == ([RESULT, OTHER], [])
    assert [json.loads(line)["method"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [
        "vid",
        "student",
    ]


def test_a_folder_without_results_holds_none(tmp_path):
    assert results.read(tmp_path) == ([], [])


def test_a_number_that_json_does_not_know_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        results.append(tmp_path, dataclasses.replace(RESULT, accuracy=math.nan))
    assert results.read(tmp_path) == ([], [])


@pytest.mark.parametrize("kept", [1, 40, -1], ids=["first-byte", "middle", "all-but-the-newline"])
def test_a_torn_last_line_is_told_and_the_next_result_survives(tmp_path, kept):
    results.append(tmp_path, RESULT)
    path, whole = tmp_path / "results.jsonl", (tmp_path / "results.jsonl").read_bytes()
    path.write_bytes(whole + whole[:kept])
    found, notes = results.read(tmp_path)
    torn = kept != -1  # only the newline is missing: nothing is lost
    assert found == [RESULT] * (1 if torn else 2) and len(notes) == torn
    results.append(tmp_path, OTHER)
    found, notes = results.read(tmp_path)
    assert found[-1] == OTHER and len(found) == (2 if torn else 3)
    if torn:
        assert notes == [f"{path}, line 2: not a whole result, skipped; its run will be made again"]


@pytest.mark.parametrize(
    "line", [b"5", b"[]", b"null", b"{}", b'{"method": "vid"}', b"\xff\xfe", b'"text"', b"not json"]
)
def test_a_line_that_is_no_result_is_told_and_skipped(tmp_path, line):
    (tmp_path / "results.jsonl").write_bytes(line + b"\n\n")
    results.append(tmp_path, RESULT)
    found, (note,) = results.read(tmp_path)
    assert found == [RESULT] and "line 1: not a whole result" in note


@pytest.mark.parametrize("config", [None, [], "vid"], ids=str)
def test_a_line_without_a_configuration_is_skipped_too(tmp_path, config):
    results.append(tmp_path, RESULT)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(json.dumps(dataclasses.asdict(RESULT) | {"config": config}) + "\n")
    found, notes = results.read(tmp_path)
    assert found == [RESULT] and len(notes) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": "abc"},
        {"accuracy": None},
        {"accuracy": float("nan")},
        {"method": 5},
        {"seed": [1]},
        {"seed": True},
        {"seconds": "1"},
        {"group": None},
        {"group": [1]},
        {"per_class": "7"},
        {"history": []},
        {"evaluated_on": "a/b"},
        {"history": [{"epoch": 1}]},
        {"history": [dataclasses.asdict(RESULT.history[0]) | {"variances": {"stem": ["x"]}}]},
    ],
    ids=str,
)
def test_a_line_with_values_of_another_type_is_skipped(tmp_path, change):
    results.append(tmp_path, RESULT)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(json.dumps(dataclasses.asdict(OTHER) | change) + "\n")
    found, (note,) = results.read(tmp_path)
    assert found == [RESULT] and "line 2: not a whole result" in note


@pytest.mark.parametrize(
    "content", ['{"my": "other program"}\n', "epoch,accuracy\n1,50\n"], ids=["json", "csv"]
)
def test_results_of_another_program_or_version_are_refused(tmp_path, content):
    (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(
        InputError,
        match="results.jsonl holds no result that this version of fastvid can read: give another folder",
    ):
        results.read(tmp_path)


def test_a_folder_is_held_by_one_process_and_nested_calls_of_it(tmp_path):
    program = "import sys; from pathlib import Path; from fastvid import results\nwith results.exclusive(Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with results.exclusive(tmp_path):
        with results.exclusive(tmp_path):
            pass
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        holder = rf"\(process {os.getpid()} on \S+, since [-0-9: ]+\)"
        said = rf"another fastvid {holder} is at work in {tmp_path}: wait for it, or give another --out"
        assert second.returncode and re.search(said, second.stderr)
    subprocess.run(command, check=True)


def test_a_new_or_empty_folder_becomes_an_output_folder_and_stays_one(tmp_path):
    folder = tmp_path / "deep" / "out"
    assert results.open_folder(folder) == folder
    results.append(folder, RESULT)
    (folder / "notes.txt").write_text("mine")
    results.open_folder(folder)
    assert results.read(folder) == ([RESULT], [])
    assert sorted(path.name for path in folder.iterdir()) == [".results.lock", "notes.txt", "results.jsonl"]


def test_a_new_folder_that_two_open_at_once_is_an_output_folder_for_both(tmp_path):
    with ThreadPoolExecutor(2) as threads:
        for n in range(300):
            barrier = threading.Barrier(2)
            opened = [
                threads.submit(lambda: (barrier.wait(), results.open_folder(tmp_path / str(n)))[1])
                for _ in range(2)
            ]
            assert [future.result() for future in opened] == [tmp_path / str(n)] * 2


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(
        InputError,
        match=f"{tmp_path} holds files but no results.jsonl, .*: give --out a new or an empty folder",
    ):
        results.open_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("file", id="is-a-file"),
        pytest.param("file/out", id="below-a-file"),
        pytest.param("taken", id="results-is-a-folder"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "results.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match=f"{tmp_path / name}: cannot write there: .*; choose another --out"):
        results.open_folder(tmp_path / name)


def test_results_that_cannot_be_written_or_read_are_an_input_error(tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(
        InputError, match="results.jsonl: cannot write: .*; see to the folder, then start again"
    ):
        results.append(tmp_path, RESULT)
    with pytest.raises(InputError, match="results.jsonl: cannot read"):
        results.read(tmp_path)


def test_a_run_is_known_by_data_set_method_subset_and_seed():
    changed = {"dataset": "cifar10", "method": "kd", "per_class": 8, "seed": 2}
    keys = {
        RESULT.key(),
        *(dataclasses.replace(RESULT, **{name: value}).key() for name, value in changed.items()),
    }
    assert len(keys) == 5 and dataclasses.replace(RESULT, accuracy=1.0).key() == RESULT.key()


def test_a_folder_with_nothing_but_the_lock_of_an_emptied_one_is_taken(tmp_path):
    (tmp_path / ".lock").touch()
    assert results.open_folder(tmp_path) == tmp_path


def test_a_process_that_was_killed_is_not_named_as_the_holder(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    file = tmp_path / results._HOLDER
    file.write_text(f"process {dead.pid} on {platform.node()}, since yesterday\n")
    assert results._holder(tmp_path) == ""
    file.write_text(f"process {os.getpid()} on {platform.node()}, since today\n")
    assert results._holder(tmp_path) == f" (process {os.getpid()} on {platform.node()}, since today)"
    file.write_text(f"process {dead.pid} on another-machine, since yesterday\n")
    assert "another-machine" in results._holder(tmp_path), "nobody here knows about its processes"
