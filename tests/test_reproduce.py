"""The grid from the command line: methods x fractions x seeds on digits, one epoch, the smallest networks."""

import hashlib
import re
import signal
from pathlib import Path

import pytest
import torch
from fastvid.engine import GroupStep

from fastvid import checkpoint, cli, results
from fastvid.errors import InputError
from fastvid.reproduce import images_per_class
from fastvid.wresnet import WideResNet

SMALL = [
    "--dataset",
    "digits",
    "--student-depth",
    "10",
    "--teacher-depth",
    "10",
    "--teacher-width",
    "1",
    "--epochs",
    "1",
    "--batch-size",
    "70",
    "--precision",
    "fp32",
    "--methods",
    "student,vid",
]


def reproduce(out, *options):
    return cli.main(["reproduce", *SMALL, "--out", str(out), *options])


@pytest.fixture
def steps(monkeypatch):
    """The students of every step that is taken; `steps.interrupt_at = n` sends SIGINT during the n-th."""
    real = GroupStep.__call__

    class Steps(list):
        interrupt_at = None

    taken = Steps()

    def step(self, *batch):
        real(self, *batch)
        taken.append([learner.name for learner in self.learners])
        if len(taken) == taken.interrupt_at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(GroupStep, "__call__", step)
    return taken


def test_the_grid_trains_the_teacher_first_then_every_cell_and_ends_with_the_table(tmp_path, steps, capsys):
    out = tmp_path / "out"
    assert reproduce(out, "--fractions", "full,10", "--seeds", "2") == 0
    printed = capsys.readouterr()
    found, notes = results.read(out)
    assert not notes
    teacher, *students = found
    assert (teacher.method, teacher.per_class, teacher.seed, teacher.train_images, teacher.steps) == (
        "teacher",
        None,
        0,
        1400,
        20,
    )
    assert [(run.seed, run.per_class, run.method) for run in students] == [
        (seed, per_class, method)
        for seed in (0, 1)
        for per_class in (None, 14)
        for method in ("student", "vid")
    ]
    for run in found:
        assert hashlib.sha256((out / run.weights).read_bytes()).hexdigest() == run.weights_sha256
        summary = f"\n{run.method} | {run.percent:.3g} % of digits, seed {run.seed}: {run.accuracy:.2f} % on test after the last epoch"
        assert summary in printed.err
    taught = [run for run in students if run.method == "vid"]
    assert {(run.teacher_sha256, run.teacher_accuracy) for run in taught} == {
        (teacher.weights_sha256, teacher.accuracy)
    }
    assert steps == [["teacher"]] * 20 + ([["student", "vid"]] * 20 + [["student", "vid"]] * 2) * 2, (
        "students share a step"
    )

    table = (out / "table.md").read_text()
    assert table.strip() in printed.out and all(name in table for name in ("Teacher", "Student", "VID", "±"))
    assert {"table.csv", "table.md", "results.jsonl"} <= {path.name for path in out.iterdir()} and not list(
        out.glob("*.resume")
    )

    steps.clear()
    written = (out / results.FILE).read_bytes()
    assert reproduce(out, "--fractions", "full,10", "--seeds", "2") == 0
    assert not steps and (out / results.FILE).read_bytes() == written
    assert capsys.readouterr().out == printed.out


def test_an_interrupted_grid_goes_on_where_it_stopped_and_grows_to_the_same_results(tmp_path, steps, capsys):
    grid = ["--fractions", "10,5", "--seeds", "1", "--teacher", str(teacher_in(tmp_path))]
    assert reproduce(tmp_path / "whole", *grid) == 0
    whole, _ = results.read(tmp_path / "whole")
    total = len(steps)

    steps.clear()
    steps.interrupt_at = 3  # two steps at 10 % are done then, and one of one at 5 %
    assert reproduce(tmp_path / "broken", *grid) == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"fastvid: stopped after step 1 of 1, all is saved in .*broken: the same command goes on from there",
        message,
    )
    assert [run.per_class for run in results.read(tmp_path / "broken")[0]] == [14, 14]
    assert reproduce(tmp_path / "broken", *grid) == 0
    assert len(steps) == total, "no step is taken twice"
    broken, _ = results.read(tmp_path / "broken")
    assert [(run.method, run.per_class, run.accuracy, run.history) for run in broken] == [
        (run.method, run.per_class, run.accuracy, run.history) for run in whole
    ]


def test_a_given_teacher_is_used_and_its_accuracy_recorded(tmp_path, steps):
    teacher = teacher_in(tmp_path)
    assert reproduce(tmp_path / "out", "--fractions", "5", "--seeds", "1", "--teacher", str(teacher)) == 0
    student, vid = results.read(tmp_path / "out")[0]
    assert steps == [["student", "vid"]]
    assert (
        vid.teacher_sha256 == hashlib.sha256(teacher.read_bytes()).hexdigest()
        and 0 < vid.teacher_accuracy < 100
    )
    assert student.teacher_sha256 is None
    assert f"{vid.teacher_accuracy:.2f}" in (tmp_path / "out" / "table.md").read_text()


def teacher_in(folder: Path) -> Path:
    torch.manual_seed(0)
    checkpoint.save_weights(folder / "teacher.safetensors", WideResNet(10, 1).state_dict(), {})
    return folder / "teacher.safetensors"


@pytest.mark.parametrize(
    "fraction, class_size, count",
    [
        ("full", 5000, None),
        ("20", 5000, 1000),
        ("10", 5000, 500),
        ("2", 5000, 100),
        ("5", 140, 7),
        ("10", 140, 14),
        ("0.5", 140, 1),
        ("12.5", 500, 62),
    ],
)
def test_a_fraction_is_that_share_of_each_class(fraction, class_size, count):
    assert images_per_class(fraction, class_size) == count


def test_a_fraction_of_less_than_one_image_is_refused():
    with pytest.raises(
        InputError, match="--fractions 0.1: 0.1 % of 140 images per class is less than one image: take more"
    ):
        images_per_class("0.1", 140)


@pytest.mark.parametrize(
    "options, phrase",
    [
        pytest.param(["--methods", "student,dkd"], "unknown method 'dkd'", id="unknown-method"),
        pytest.param(
            ["--methods", "vid,vid"], "vid,vid, wanted one or more methods, each once", id="a-method-twice"
        ),
        pytest.param(
            ["--fractions", "full,half"],
            "--fractions is full,half, wanted full or percents",
            id="unknown-fraction",
        ),
        pytest.param(["--fractions", "full,0.1"], "is less than one image", id="fraction-of-no-image"),
        pytest.param(
            ["--fractions", "full,10,4"],
            "a batch of 70 is larger than the training subset of 60 images",
            id="last-fraction-below-the-batch",
        ),
        pytest.param(
            ["--fractions", "full,10", "--validation-per-class", "14"],
            "validation",
            id="last-fraction-below-the-validation-split",
        ),
        pytest.param(
            ["--fractions", "10", "--student-depth", "11"],
            "--student-depth is 11, wanted 6n + 4",
            id="students-that-cannot-be-built",
        ),
        pytest.param(["--seeds", "0"], "--seeds is 0, wanted 1 or more", id="no-seeds"),
    ],
)
def test_what_is_wrong_anywhere_in_the_grid_is_said_before_anything_is_trained(
    tmp_path, steps, capsys, options, phrase
):
    assert reproduce(tmp_path / "out", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastvid: error: ") and phrase in line
    assert not steps


@pytest.mark.survival("wrong but well-formed")
def test_a_grid_whose_file_lost_the_result_of_its_teacher_goes_on_with_the_teacher_that_is_there(
    tmp_path, steps, capsys
):
    out = tmp_path / "out"
    assert reproduce(out, "--fractions", "10", "--seeds", "1") == 0
    path = out / results.FILE
    _, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(others))
    steps.clear()
    assert reproduce(out, "--fractions", "10", "--seeds", "2") == 0
    assert (
        "teacher-full-seed0.safetensors taught the students of results.jsonl, which has lost the result of it"
        in capsys.readouterr().err
    )
    assert steps == [["student", "vid"]] * 2
    (out / "teacher-full-seed0.safetensors").unlink()
    assert reproduce(out, "--fractions", "10", "--seeds", "3") == 2
    assert (
        "whose result is not there, so none is trained there: give that one as --teacher"
        in capsys.readouterr().err
    )
