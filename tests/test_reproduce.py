"""The grid from the command line: methods x fractions x seeds on digits, one epoch, the smallest networks."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from tiny import after_each_step, options, signal_after

from fastvid import checkpoint, cli, config, results
from fastvid.errors import InputError
from fastvid.reproduce import images_per_class
from fastvid.wresnet import WideResNet

SMALL = {
    "dataset": "digits",
    "device": "cpu",
    "student_depth": 10,
    "teacher_depth": 10,
    "teacher_width": 1,
    "epochs": 1,
    "batch_size": 70,
    "precision": "fp32",
    "methods": "student,vid",
    "fractions": "5",
    "seeds": 1,
}


def reproduce(out, **settings):
    return cli.main(["reproduce", *options(**SMALL | settings), "--out", str(out)])


@pytest.fixture
def steps():
    """The students of every step that is taken while the test runs."""
    taken = []
    with after_each_step(lambda step, *_: taken.append([student.name for student in step.students])):
        yield taken


@pytest.fixture
def teacher(tmp_path):
    """Path of an untrained WRN-10-1."""
    torch.manual_seed(0)
    checkpoint.save_weights(tmp_path / "teacher.safetensors", WideResNet(10, 1).state_dict(), {})
    return tmp_path / "teacher.safetensors"


@pytest.mark.slow
def test_the_grid_trains_the_teacher_first_then_every_cell_and_ends_with_the_table(tmp_path, steps, capsys):
    out, grid = tmp_path / "out", {"fractions": "full,10", "seeds": 2}
    assert reproduce(out, **grid) == 0
    printed, (found, notes) = capsys.readouterr(), results.read(out)
    teacher, *students = found
    assert not notes and (teacher.method, teacher.per_class, teacher.seed) == ("teacher", None, 0)
    assert (teacher.train_images, teacher.steps) == (1400, 20)
    assert [(run.seed, run.per_class, run.method) for run in students] == [
        (seed, per_class, method)
        for seed in (0, 1)
        for per_class in (None, 14)
        for method in ("student", "vid")
    ]
    for run in found:
        assert hashlib.sha256((out / run.weights).read_bytes()).hexdigest() == run.weights_sha256
        summary = (
            f"\n{run.method} | {run.percent:.3g} % of digits, seed {run.seed}: {run.accuracy:.2f} % on test"
        )
        assert summary in printed.err
    taught = {(run.teacher_sha256, run.teacher_accuracy) for run in students if run.method == "vid"}
    assert taught == {(teacher.weights_sha256, teacher.accuracy)}
    assert steps == [["teacher"]] * 20 + [["student", "vid"]] * 22 * 2, "students share a step"
    table = (out / "table.md").read_text()
    assert table.strip() in printed.out and all(name in table for name in ("Teacher", "Student", "VID", "±"))
    assert (out / "table.csv").is_file() and not list(out.glob("*.resume"))

    steps.clear()
    written = (out / results.FILE).read_bytes()
    assert reproduce(out, **grid) == 0
    assert not steps and (out / results.FILE).read_bytes() == written
    assert capsys.readouterr().out == printed.out


@pytest.mark.slow
def test_an_interrupted_grid_resumes_where_it_stopped_and_ends_with_the_same_results(
    tmp_path, steps, teacher, capsys
):
    grid = {"fractions": "10,5", "teacher": teacher}
    assert reproduce(tmp_path / "whole", **grid) == 0
    total = len(steps)
    steps.clear()
    with signal_after(3):  # two steps at 10 % are done then, and one of one at 5 %
        assert reproduce(tmp_path / "broken", **grid) == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"fastvid: stopped after step 1 of 1, everything is saved in .*: the same .* resumes there", message
    )
    assert [run.per_class for run in results.read(tmp_path / "broken")[0]] == [14, 14]
    assert reproduce(tmp_path / "broken", **grid) == 0
    assert len(steps) == total, "no step is taken twice"
    whole, broken = (
        [(run.method, run.per_class, run.accuracy, run.history) for run in results.read(tmp_path / name)[0]]
        for name in ("whole", "broken")
    )
    assert whole == broken


@pytest.mark.slow
def test_a_given_teacher_is_used_and_its_accuracy_recorded(tmp_path, steps, teacher):
    assert reproduce(tmp_path / "out", teacher=teacher) == 0
    student, vid = results.read(tmp_path / "out")[0]
    assert steps == [["student", "vid"]] and student.teacher_sha256 is None
    assert vid.teacher_sha256 == hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert f"{vid.teacher_accuracy:.2f}" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
@pytest.mark.survival("numbers")
def test_a_student_that_diverges_costs_its_cells_only_and_the_grid_ends_with_status_1(
    tmp_path, steps, teacher, capsys
):
    grid = {"methods": "student,fitnet", "fractions": "10,5", "teacher": teacher}
    out = tmp_path / "out"
    for _ in range(2):  # the second command trains nothing
        assert reproduce(out, fitnet_weight=1e39, **grid) == 1
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-2:] == [
            f"fastvid: fitnet ({per_class} per class, seed 0) diverged in epoch 1: transfer loss inf"
            for per_class in (14, 7)
        ]
        assert "| Student" in printed.out
    assert len(steps) == 3
    assert reproduce(tmp_path / "whole", fractions="10,5", methods="student") == 0
    assert [run.weights_sha256 for run in results.read(out)[0] if not run.diverged] == [
        run.weights_sha256 for run in results.read(tmp_path / "whole")[0]
    ]
    assert reproduce(out, fitnet_weight=1, **grid) == 0, "tried again, because its settings changed"


def test_a_grid_whose_teacher_diverged_ends_with_the_remedy(tmp_path, steps, capsys):
    for _ in range(2):
        assert reproduce(tmp_path / "out", learning_rate=1e30) == 2
        assert "the teacher diverged in epoch 1: " in capsys.readouterr().err
    assert steps == [["teacher"]] * 20, "once"


@pytest.mark.parametrize(
    "fraction, class_size, count",
    [("full", 5000, None), ("20", 5000, 1000), ("5", 140, 7), ("0.5", 140, 1), ("12.5", 500, 62)],
)
def test_a_fraction_is_that_share_of_each_class(fraction, class_size, count):
    assert images_per_class(fraction, class_size) == count


def test_a_fraction_of_less_than_one_image_is_refused():
    with pytest.raises(
        InputError, match="--fractions 0.1: 0.1 % of 140 images per class is less than one image"
    ):
        images_per_class("0.1", 140)


@pytest.mark.parametrize(
    "settings, phrase",
    [
        pytest.param({"methods": "student,dkd"}, "unknown method 'dkd'", id="unknown-method"),
        pytest.param({"methods": "vid,vid"}, "wanted one or more methods, each once", id="a-method-twice"),
        pytest.param({"fractions": "full,half"}, "wanted full or percents", id="unknown-fraction"),
        pytest.param({"fractions": "full,0.1"}, "is less than one image", id="fraction-of-no-image"),
        pytest.param(
            {"fractions": "full,10,4"},
            "a batch of 70 is larger than the training subset of 60 images",
            id="last-fraction-below-the-batch",
        ),
        pytest.param(
            {"fractions": "full,10", "validation_per_class": 14},
            "validation",
            id="last-fraction-below-the-validation-split",
        ),
        pytest.param({"student_depth": 11}, "--student-depth is 11, wanted 6n + 4", id="impossible-student"),
        pytest.param({"seeds": 0}, "--seeds is 0, wanted 1 or more", id="no-seeds"),
        pytest.param(
            {"methods": "teacher,vid", "teacher": "FILE"},
            "--teacher gives a teacher and --methods asks to train one: leave one of them out",
            id="two-teachers",
        ),
    ],
)
def test_an_error_anywhere_in_the_grid_is_found_before_anything_is_trained(
    tmp_path, steps, capsys, settings, phrase
):
    assert reproduce(tmp_path / "out", **settings) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastvid: error: ") and phrase in line
    assert not steps


@pytest.mark.slow
@pytest.mark.survival("wrong but well-formed")
def test_a_grid_whose_file_lost_the_result_of_its_teacher_goes_on_with_the_teacher_that_is_there(
    tmp_path, steps, capsys
):
    out, path = tmp_path / "out", tmp_path / "out" / results.FILE
    assert reproduce(out, fractions="10") == 0
    _, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(others))
    steps.clear()
    assert reproduce(out, fractions="10", seeds=2) == 0
    assert "the teacher of the results here, although its result line" in capsys.readouterr().err
    assert steps == [["student", "vid"]] * 2
    Path(out, "teacher-full-seed0.safetensors").unlink()
    assert reproduce(out, fractions="10", seeds=3) == 2
    assert "whose result is not there, so no other teacher is trained there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_teacher_and_subsets_whose_protocol_has_other_lengths_share_a_folder(tmp_path, monkeypatch):
    lengths = config.Protocol(teacher_epochs=3, full_epochs=1, reduced_epochs=2, batch_size=70, evaluations=1)
    monkeypatch.setitem(config.PROTOCOLS, "quick", lengths)
    settings = {
        name: value for name, value in SMALL.items() if name not in ("epochs", "batch_size", "fractions")
    }
    assert cli.main(["reproduce", *options(**settings), "--out", str(tmp_path)]) == 0
    found, _ = results.read(tmp_path)
    assert [(run.method, run.config["epochs"]) for run in found] == [
        ("teacher", 3), ("student", 1), ("vid", 1), ("student", 2), ("vid", 2)
    ]  # fmt: skip
