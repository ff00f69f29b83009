import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
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
        Evaluation(2, 61.2, 1.5, 30.25, {"stem": [4.1, 4.2, 4.3]}, {"vid at stem": [0.31, 0.18]}),
    ],
    weights="vid-7-seed1.safetensors",
    weights_sha256="ab" * 32,
    data_sha256="da" * 32,
    teacher_sha256="cd" * 32,
    teacher_accuracy=97.0,
    config={"method": ["vid"], "vid": {"weight": None}},
    environment={"torch": "2.15.0"},
    title="VID",
    colour="#D55E00",
    date="2026-01-02T03:04:05+00:00",
    command="fastvid train --method vid",
)
OTHER = dataclasses.replace(
    RESULT, method="student", teacher_sha256=None, teacher_accuracy=None, per_class=None
)
DIVERGED = dataclasses.replace(
    OTHER,
    seed=2,
    accuracy=None,
    best_accuracy=None,
    weights="",
    weights_sha256="",
    history=[],
    diverged="epoch 1: transfer loss inf",
)


def line_of(entry: dict) -> str:
    """`entry` as a line with a checksum that matches."""
    checksum = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    return json.dumps(entry | {"sha256": checksum}) + "\n"


def test_results_come_back_equal_and_in_order(tmp_path):
    for result in (RESULT, OTHER, DIVERGED):
        results.append(tmp_path, result)
    assert results.read(tmp_path) == ([RESULT, OTHER, DIVERGED], [])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["vid", "student", "student"]


def test_a_field_that_an_older_line_lacks_gets_its_default_and_a_field_of_a_newer_one_is_ignored(tmp_path):
    entry = dataclasses.asdict(RESULT)
    older = {
        name: entry[name] for name in entry if name not in ("title", "colour", "date", "command", "diverged")
    }
    older["history"] = [
        {name: point[name] for name in point if name != "information"} for point in older["history"]
    ]
    newer = entry | {"energy": 3, "history": [point | {"loss": 1} for point in entry["history"]]}
    (tmp_path / "results.jsonl").write_text(line_of(older) + line_of(newer))
    (first, second), remarks = results.read(tmp_path)
    assert (first.title, first.colour, first.date, first.command, first.diverged) == ("", "", "", "", None)
    assert [point.information for point in first.history] == [{}, {}] and first.accuracy == RESULT.accuracy
    assert second == RESULT and not remarks


def test_a_folder_without_results_holds_none(tmp_path):
    assert results.read(tmp_path) == ([], [])


def test_a_number_that_json_does_not_know_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        results.append(tmp_path, dataclasses.replace(RESULT, accuracy=math.nan))
    assert results.read(tmp_path) == ([], [])


@pytest.mark.parametrize("kept", [1, 40, -1], ids=["first-byte", "middle", "all-but-the-newline"])
def test_a_torn_last_line_is_reported_and_the_next_result_survives(tmp_path, kept):
    results.append(tmp_path, RESULT)
    path, whole = tmp_path / "results.jsonl", (tmp_path / "results.jsonl").read_bytes()
    path.write_bytes(whole + whole[:kept])
    found, remarks = results.read(tmp_path)
    torn = kept != -1  # only the newline is missing: nothing is lost
    assert found == [RESULT] * (1 if torn else 2) and len(remarks) == torn
    results.append(tmp_path, OTHER)
    found, remarks = results.read(tmp_path)
    assert found[-1] == OTHER and len(found) == (2 if torn else 3)
    if torn:
        assert remarks == [f"{path}, line 2: not a complete result, skipped; its run will be trained again"]


@pytest.mark.parametrize(
    "line",
    [
        *("5", "[]", "null", "{}", '{"method": "vid"}', "\udcff\udcfe", '"text"', "not json", "[" * 9999),
        pytest.param(json.dumps(dataclasses.asdict(OTHER)), id="no-checksum"),
        pytest.param(line_of(dataclasses.asdict(RESULT)).replace("61.2", "91.2").strip(), id="changed-value"),
        pytest.param(line_of(dataclasses.asdict(RESULT)).replace("61.2", "NaN").strip(), id="nan"),
        pytest.param(line_of({"mine": 1}).strip(), id="checksum-of-another-program"),
    ],
)
def test_a_line_that_is_not_a_result_is_reported_and_skipped(tmp_path, line):
    (tmp_path / "results.jsonl").write_bytes(line.encode(errors="surrogateescape") + b"\n\n")
    results.append(tmp_path, RESULT)
    found, (remark,) = results.read(tmp_path)
    assert found == [RESULT] and "line 1: not a complete result" in remark


@pytest.mark.parametrize(
    "content", ['{"my": "other program"}\n', "epoch,accuracy\n1,50\n"], ids=["json", "csv"]
)
def test_results_of_another_program_are_refused(tmp_path, content):
    (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(
        InputError, match="no result that this version of fastvid can read: give another folder"
    ):
        results.read(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_remedy_and_never_waited_for(
    tmp_path, monkeypatch, number
):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    message = f"{tmp_path} is on a file system without file locks .*: choose a folder on a local disk"
    with pytest.raises(InputError, match=message):
        results.append(tmp_path, RESULT)


def test_results_of_several_processes_are_all_kept(tmp_path):
    seeds = range(20)
    with ThreadPoolExecutor(4) as threads:
        list(
            threads.map(lambda seed: results.append(tmp_path, dataclasses.replace(RESULT, seed=seed)), seeds)
        )
    assert sorted(run.seed for run in results.read(tmp_path)[0]) == list(seeds)


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
    message = f"{tmp_path} holds files but no results.jsonl, .*: give --out a new or an empty folder"
    with pytest.raises(InputError, match=message):
        results.open_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_with_only_the_lock_of_an_emptied_one_is_accepted(tmp_path):
    (tmp_path / ".lock").touch()
    assert results.open_folder(tmp_path) == tmp_path


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
        InputError, match="results.jsonl: cannot write: .*; repair the folder, then start again"
    ):
        results.append(tmp_path, RESULT)
    with pytest.raises(InputError, match="results.jsonl: cannot read"):
        results.read(tmp_path)


def test_a_run_is_identified_by_data_set_method_subset_and_seed():
    changed = {"dataset": "cifar10", "method": "kd", "per_class": 8, "seed": 2}
    keys = {dataclasses.replace(RESULT, **{name: value}).key() for name, value in changed.items()}
    assert len(keys | {RESULT.key()}) == 5
    assert dataclasses.replace(RESULT, accuracy=1.0).key() == RESULT.key()
