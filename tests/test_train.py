"""Training end to end, on tiny networks and the few digits of tiny.py."""

import copy
import dataclasses
import hashlib
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import STEPS, TINY, after_each_step, command, signal_after

from fastvid import checkpoint, cli, datasets, group, results
from fastvid.config import CIRCUMSTANCES, FitNetOptions, TrainConfig, VIDOptions
from fastvid.errors import InputError, Interrupted
from fastvid.folder import OutputFolder
from fastvid.group import Group
from fastvid.loader import EvalLoader, describe
from fastvid.methods import build
from fastvid.step import GroupStep, evaluate
from fastvid.stopwatch import Stopwatch
from fastvid.student import Student
from fastvid.train import is_evaluated, learning_rate, train
from fastvid.wresnet import WideResNet, frozen

CPU = torch.device("cpu")
LOST = {"fitnet": FitNetOptions(weight=1e39)}  # infinite in fp32
RESUME = "5-seed0.resume"
SLOW_FP16 = pytest.param("fp16", marks=pytest.mark.slow)  # convolutions of a CPU are slow in fp16
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16", SLOW_FP16])


@pytest.fixture
def tiny(tmp_path, teacher):
    """tiny("a", "vid", "kd", seed=1): the config of a group whose output folder is tmp_path/a."""
    return lambda out, *methods, **settings: TrainConfig(
        **TINY | {"method": methods, "teacher": teacher, "out": str(tmp_path / out)} | settings
    )


@pytest.fixture
def forwards():
    """Every forward pass of a WideResNet while the test runs, as (network, images)."""
    seen = []

    def hook(module, inputs, _):
        if isinstance(module, WideResNet):
            seen.append((module, len(inputs[0])))

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    yield seen
    handle.remove()


def interrupt(config, after):
    """Train until SIGINT arrives in step `after` of this process; returns the message."""
    with signal_after(after), pytest.raises(Interrupted) as stopped:
        train(config)
    return str(stopped.value)


def weights_of(result):
    return checkpoint.load_weights(f"{result.config['out']}/{result.weights}")


def bits(result):
    """SHA-256 of the final tensors, the method's included."""
    return weights_of(result).metadata["tensors_sha256"]


def files_in(config):
    return sorted(path.name for path in Path(config.out).iterdir() if not path.name.startswith("."))


def state_of(config):
    return checkpoint.load_state(Path(config.out, RESUME))


def same(one, other):
    """Whether two results are of the same training."""
    return bits(one) == bits(other) and one.history == other.history and one.steps == other.steps


# --- reproducible


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_gives_others(tiny, precision):
    first, again, other = (
        [bits(result) for result in train(tiny(out, "student", "vid", seed=seed, precision=precision))]
        for out, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert len({*first, *other}) == 4


def test_a_student_of_a_group_has_the_bits_of_the_same_student_trained_alone(tiny):
    together = train(tiny("group", "student", "kd+at", "fitnet", "vid"))
    for result in together:
        (alone,) = train(tiny(f"alone-{result.method}", result.method))
        assert same(alone, result), result.method
        assert result.group == ["student", "kd+at", "fitnet", "vid"]


def test_students_start_from_the_same_weights_whatever_their_method(tiny):
    student, vid = (
        weights_of(result).tensors for result in train(tiny("a", "student", "vid", learning_rate=0.0))
    )
    trained = [name for name in student if not re.search("running|num_batches", name)]
    assert all(torch.equal(student[name], vid[name]) for name in trained)


def test_neither_the_method_nor_the_loader_changes_a_batch(tiny):
    seen = {}

    def note(_, images, labels):
        seen[name].append(hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest())

    for name in ("student", "vid", "torch"):
        seen[name] = []
        with after_each_step(note):
            train(tiny(name, "student", loader="torch") if name == "torch" else tiny(name, name))
    assert len(seen["student"]) == 2 * STEPS and all(batches == seen["student"] for batches in seen.values())


# --- interrupted


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(1, id="first-step", marks=pytest.mark.slow),
        pytest.param(STEPS, id="last-step-of-an-epoch"),
        pytest.param(STEPS + 2, id="within-an-epoch", marks=pytest.mark.slow),
        pytest.param(4 * STEPS, id="very-last-step"),
    ],
)
def test_an_interrupted_group_resumes_to_the_same_bits(tiny, after):
    methods = "student", "fitnet", "vid"
    settings = {"epochs": 4, "evaluations": 2, "fitnet": FitNetOptions(schedule="two-stage", hint_share=0.5)}
    whole, config = train(tiny("whole", *methods, **settings)), tiny("broken", *methods, **settings)
    assert interrupt(config, after) == (
        f"stopped after step {after} of {4 * STEPS}, everything is saved in {config.out}: "
        "the same command resumes there"
    )
    assert files_in(config) == [RESUME, "results.jsonl"]
    assert all(map(same, train(config), whole))
    assert [point.epoch for point in whole[0].history] == [2, 4] and RESUME not in files_in(config)


def test_a_group_that_is_interrupted_twice_resumes_too_and_its_seconds_add_up(tiny):
    (whole,), config = train(tiny("whole", "vid")), tiny("broken", "vid")
    interrupt(config, after=2)
    before = state_of(config)["seconds"]["training"]
    assert "step 3 of 6" in interrupt(config, after=1)
    (resumed,) = train(config)
    assert same(resumed, whole) and resumed.seconds > before > 0


def test_a_method_added_to_an_interrupted_group_is_trained_in_a_group_of_its_own_after_it(tiny):
    whole = train(tiny("whole", "student", "vid"))
    interrupt(tiny("broken", "student"), after=2)
    resumed = train(tiny("broken", "vid", "student"))
    assert [result.method for result in resumed] == ["vid", "student"]
    assert all(map(same, reversed(resumed), whole))
    assert [result.group for result in resumed] == [["vid"], ["student"]]
    assert [result.method for result in results.read(Path(resumed[0].config["out"]))[0]] == ["student", "vid"]


def test_a_command_that_leaves_out_a_student_of_an_interrupted_group_is_refused_with_its_name(tiny):
    config = tiny("a", "student", "vid")
    interrupt(config, after=1)
    before = state_of(config)
    with pytest.raises(InputError, match=f"{RESUME} holds the interrupted students student, vid: give all"):
        train(tiny("a", "student", "kd"))
    assert state_of(config)["step"] == before["step"] == 1


def test_a_resume_file_that_a_kill_left_behind_after_the_last_result_is_removed(tiny, monkeypatch):
    config = tiny("a", "student")

    def finish_and_end(self, one):
        self.finish_student(one, *one.students)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OutputFolder, "finish", finish_and_end)
        train(config)
    assert RESUME in files_in(config) and len(results.read(Path(config.out))[0]) == 1
    added = train(tiny("a", "student", "kd"))
    assert [result.method for result in added] == ["student", "kd"] and RESUME not in files_in(config)


@pytest.mark.survival("wrong but well-formed")
@pytest.mark.parametrize(
    "change, phrase",
    [
        pytest.param(
            {"learning_rate": 0.05},
            "was made with learning_rate = 0.1, but now the value is 0.05: give the old settings, another ",
            id="setting",
        ),
        pytest.param(
            {"vid": VIDOptions(weight=2.0)},
            "was made with vid = .*, but now the value is .*2.0",
            id="setting-of-a-method",
        ),
        pytest.param({"teacher": "another"}, "was made with another teacher: give the old", id="teacher"),
    ],
)
def test_a_resume_state_of_another_configuration_is_refused_and_kept(tiny, tmp_path, change, phrase):
    interrupt(tiny("a", "vid"), after=1)
    resume = tmp_path / "a" / RESUME
    before = resume.read_bytes()
    if "teacher" in change:
        change = {"teacher": str(tmp_path / "another.safetensors")}
        checkpoint.save_weights(Path(change["teacher"]), WideResNet(10, 2).state_dict(), {})
    with pytest.raises(InputError, match=f"{resume} {phrase}"):
        train(tiny("a", "vid", **change))
    assert resume.read_bytes() == before


def with_momenta(state, change):
    """The state with every momentum of vid changed; without the momenta that become None."""
    momenta = {name: change(value) for name, value in state["students"]["vid"]["momenta"].items()}
    state["students"]["vid"]["momenta"] = {
        name: value for name, value in momenta.items() if value is not None
    }
    return state


@pytest.mark.survival("wrong but well-formed")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda state: {"epoch": 3}, id="another-state"),
        pytest.param(lambda state: torch.ones(3), id="a-tensor"),
        pytest.param(lambda state: state | {"students": {"vid": {}}}, id="parts-missing"),
        pytest.param(lambda state: state | {"step": math.inf}, id="no-step"),
        pytest.param(lambda state: with_momenta(state, lambda m: m.to(torch.complex64)), id="another-type"),
        pytest.param(lambda state: with_momenta(state, lambda m: m.to_sparse()), id="sparse"),
        pytest.param(lambda state: with_momenta(state, lambda m: torch.ones(3)), id="another-shape"),
        pytest.param(lambda state: with_momenta(state, lambda m: m if m.dim() > 1 else None), id="missing"),
    ],
)
def test_a_resume_state_that_does_not_fit_is_named_with_the_remedy(tiny, change):
    config = tiny("a", "vid")
    interrupt(config, after=1)
    torch.save(change(state_of(config)), Path(config.out, RESUME))
    with pytest.raises(InputError, match=f"{RESUME} is not a resume state of this version.*: delete it"):
        train(config)


@pytest.mark.parametrize("content", [b"", b"nothing of ours", None], ids=["empty", "garbage", "cut"])
def test_a_resume_file_that_cannot_be_read_is_named(tiny, content):
    config = tiny("a", "vid")
    interrupt(config, after=1)
    resume = Path(config.out, RESUME)
    resume.write_bytes(resume.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError, match=f"{resume}: not a readable torch file"):
        train(config)


def with_gaps(tensor):
    return torch.empty(2 * tensor.numel())[::2].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("change", [torch.Tensor.contiguous, with_gaps], ids=["another-layout", "with-gaps"])
def test_the_memory_layout_of_a_momentum_in_the_file_does_not_matter(tiny, change):
    (whole,), config = train(tiny("whole", "vid")), tiny("a", "vid")
    interrupt(config, after=2)
    torch.save(with_momenta(state_of(config), change), Path(config.out, RESUME))
    assert same(*train(config), whole)


@pytest.mark.parametrize(
    "harm, said", [(Path.unlink, "gone"), (lambda path: path.write_bytes(b"x"), "changed")]
)
def test_lost_or_changed_weights_of_a_finished_run_are_told(harm, said, tiny, capsys):
    config = tiny("a", "student")
    (run,) = train(config)
    harm(Path(config.out, run.weights))
    assert train(config) == [run]
    told = (
        rf"{run.weights} (is|has) {said}: the result stands; to train it again, take its line out of results"
    )
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    "every, saves",
    [("1epoch", [3, 6, 9, 12]), ("3epochs", [9, 12]), ("60min", [12]), ("0min", list(range(1, 13)))],
)
def test_the_state_is_saved_as_often_as_asked_for_and_that_changes_nothing(tiny, monkeypatch, every, saves):
    (whole,), seen, save = train(tiny("whole", "vid", epochs=4)), [], OutputFolder.save
    monkeypatch.setattr(OutputFolder, "save", lambda self, one: seen.append(one.step) or save(self, one))
    assert same(*train(tiny("saved", "vid", epochs=4, checkpoint_every=every)), whole)
    assert seen == saves


@pytest.mark.survival("wrong but well-formed")
def test_a_state_of_another_version_is_refused_and_one_of_another_commit_or_machine_told(tiny, capsys):
    config = tiny("a", "student")
    interrupt(config, after=1)
    path, state = Path(config.out, RESUME), state_of(config)
    checkpoint.save_state(path, state | {"versions": state["versions"] | {"torch": "2.9.0"}})
    with pytest.raises(
        InputError, match="torch = 2.9.0, but now the value is .*: install that version again"
    ):
        train(config)
    (origin,) = state["origins"]
    elsewhere = origin | {"commit": "0123abc", "device": "NVIDIA H100", "engine": "graph"}
    checkpoint.save_state(path, state | {"origins": [elsewhere]})
    (run,) = train(config)
    assert (
        "resumes in another environment, so the bits may differ; the results record both: "
        f"commit was 0123abc and is {origin['commit']}, device was NVIDIA H100 and is {origin['device']}, "
        "engine was graph and is eager"
    ) in capsys.readouterr().err
    assert run.environment["engine"] == "graph, then eager"
    assert run.environment["commit"] == f"0123abc, then {origin['commit']}"
    assert run.environment["threads"] == origin["threads"]


@pytest.mark.survival("wrong but well-formed")
def test_results_of_another_version_are_not_mixed_with_these(tiny, monkeypatch):
    train(tiny("a", "student"))
    monkeypatch.setattr("fastvid.__version__", "9.9")
    with pytest.raises(
        InputError, match="holds results of fastvid .*, and this is 9.9: install that version"
    ):
        train(tiny("a", "kd"))


def test_a_group_that_another_process_trains_is_refused_and_another_group_in_the_same_folder_is_not(tiny):
    config = tiny("a", "student")
    with OutputFolder(config.out).claim(config) as free:
        assert free
        with pytest.raises(
            InputError, match=f"another process trains this group in {config.out}: wait for it"
        ):
            train(tiny("a", "kd"))
        train(tiny("a", "student", seed=1))


# --- signals


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_the_command_stops_on_a_signal_says_how_to_resume_and_does(tiny, number):
    config = tiny("broken", "student", epochs=40, checkpoint_every="1epoch")
    argv = command(config.out, epochs=40, checkpoint_every="1epoch")
    resume = Path(config.out, RESUME)
    with subprocess.Popen(
        [sys.executable, "-m", "fastvid", *argv], stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not resume.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # it appears after the first epoch
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 128 + number
    message = (
        rf"fastvid: stopped after step (\d+) of 120, everything is saved in {config.out}: the same command .*"
    )
    assert STEPS <= int(re.fullmatch(message, errors[-1])[1]) < 120
    assert "Traceback" not in "".join(errors) and results.read(Path(config.out)) == ([], [])
    assert cli.main(argv) == 0 and not resume.exists()
    ((resumed,), _), (whole,) = results.read(Path(config.out)), train(tiny("whole", "student", epochs=40))
    assert same(resumed, whole)


def test_a_second_signal_ends_the_process_at_once_and_the_last_state_stands(tiny, capfd):
    config = tiny("a", "vid", checkpoint_every="1epoch")
    with signal_after(STEPS + 2, signal.SIGTERM, times=2), pytest.raises(KeyboardInterrupt) as ended:
        train(config)
    assert ended.value.number == signal.SIGTERM and state_of(config)["step"] == STEPS
    assert "stopping after this step; a second signal ends the process at once" in capfd.readouterr().err
    assert same(*train(config), *train(tiny("whole", "vid")))


def test_an_evaluation_cut_by_a_signal_ends_after_the_student_and_is_repeated_for_the_others(
    tiny, monkeypatch
):
    settings = {"evaluations": 2, "fitnet": FitNetOptions(tap=("all",))}
    whole = train(tiny("whole", "student", "fitnet", "vid", **settings))
    config, evaluated = tiny("broken", "student", "fitnet", "vid", **settings), []

    def evaluate_and_count(network, *rest):
        evaluated.append(network)
        if len(evaluated) == 1:
            signal.raise_signal(signal.SIGINT)
        return evaluate(network, *rest)

    monkeypatch.setattr(group, "evaluate", evaluate_and_count)
    with pytest.raises(Interrupted, match=f"stopped after step {STEPS} of {2 * STEPS}"):
        train(config)
    assert len(evaluated) == 1
    assert {name: len(curve) for name, curve in state_of(config)["curves"].items()} == {
        "student": 1,
        "fitnet": 0,
        "vid": 0,
    }
    assert all(map(same, train(config), whole)) and len(evaluated) == 6


def test_a_signal_while_the_last_state_is_saved_is_followed_too(tiny, monkeypatch):
    config, save = tiny("a", "student"), OutputFolder.save

    def save_and_signal(self, one):
        save(self, one)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "save", save_and_signal)
        with signal_after(1, signal.SIGTERM), pytest.raises(KeyboardInterrupt):
            train(config)
    assert state_of(config)["step"] == 1
    assert same(*train(config), *train(tiny("whole", "student")))


# --- NaN and inf


@pytest.mark.survival("numbers")
@PRECISIONS
def test_a_student_that_diverges_costs_its_own_result_only(tiny, capsys, precision):
    settings = {"precision": precision, "evaluations": 2}
    whole = train(tiny("whole", "student", "vid", **settings))
    config = tiny("a", "student", "fitnet", "vid", **LOST, **settings)
    student, lost, vid = train(config)
    assert same(student, whole[0]) and same(vid, whole[1])
    assert student.diverged is None and student.group == ["student", "fitnet", "vid"]
    assert lost.diverged == "epoch 1: transfer loss inf" and lost.steps == STEPS
    assert lost.accuracy is lost.best_accuracy is None and lost.history == [] and lost.weights == ""
    said = capsys.readouterr().err
    assert "\nfitnet diverged in epoch 1: transfer loss inf; the other students continue\n" in said
    assert files_in(config) == ["results.jsonl", "student-5-seed0.safetensors", "vid-5-seed0.safetensors"]
    assert {run.method: run for run in results.read(Path(config.out))[0]} == {
        run.method: run for run in (student, lost, vid)
    }


@pytest.mark.survival("numbers")
def test_a_diverged_student_is_not_tried_again_unless_its_settings_changed(tiny, forwards, capsys):
    first = train(tiny("a", "student", "fitnet", **LOST))
    forwards.clear()
    assert train(tiny("a", "student", "fitnet", **LOST)) == first and not forwards
    assert "seed 0: diverged in epoch 1: transfer loss inf; finished before" in capsys.readouterr().err
    student, fitnet = again = train(tiny("a", "student", "fitnet"))
    assert student == first[0] and fitnet.diverged is None and same(fitnet, *train(tiny("whole", "fitnet")))
    assert train(tiny("a", "student", "fitnet")) == again


@pytest.mark.survival("numbers")
def test_the_command_ends_with_status_1_and_names_every_student_that_diverged(tmp_path, teacher, capsys):
    argv = command(tmp_path / "out", "student", "fitnet", teacher=teacher, fitnet_weight=1e39)
    for _ in range(2):
        assert cli.main(argv) == 1
        *_, line = capsys.readouterr().err.splitlines()
        assert line == "fastvid: fitnet (5 per class, seed 0) diverged in epoch 1: transfer loss inf"


@pytest.mark.survival("numbers")
@PRECISIONS
def test_a_group_whose_students_all_diverge_ends_early_and_leaves_their_results_only(tiny, precision):
    config = tiny("a", "student", learning_rate=1e6, epochs=40, evaluations=4, precision=precision)
    (run,) = train(config)
    assert re.fullmatch(r"epoch \d+: (task loss|a loss or gradient was) (nan|inf|NaN or inf)", run.diverged)
    assert run.steps < 40 * STEPS
    assert files_in(config) == ["results.jsonl"]


@pytest.mark.survival("numbers")
def test_a_stop_after_the_last_student_diverged_leaves_no_state_when_it_is_resumed(tiny):
    config = tiny("a", "fitnet", **LOST)
    interrupt(config, after=1)
    (run,) = train(config)
    assert run.diverged and run.steps == 1 and files_in(config) == ["results.jsonl"]


@pytest.mark.survival("numbers")
def test_an_infinite_gradient_is_found_at_the_next_save_and_the_last_good_state_stays(tiny, monkeypatch):
    forward, count = WideResNet.forward, iter(range(100))

    def poisoned(self, images):
        output = forward(self, images)
        if self.training and next(count) > STEPS:
            self.fc.bias.register_hook(lambda gradient: gradient * math.inf)
        return output

    monkeypatch.setattr(WideResNet, "forward", poisoned)
    (run,) = train(tiny("a", "student", epochs=4, evaluations=4, checkpoint_every="1epoch"))
    assert run.diverged == "epoch 2: a loss or gradient was NaN or inf"
    assert [point.epoch for point in run.history] == [1] and run.steps == 2 * STEPS


@pytest.mark.slow
@pytest.mark.survival("numbers")
def test_gradients_that_fp16_cannot_hold_at_any_scale_count_as_divergence(tiny):
    settings = {"precision": "fp16", "epochs": 20}
    (whole,) = train(tiny("whole", "student", **settings))
    student, lost = train(tiny("a", "student", "fitnet", fitnet=FitNetOptions(weight=1e30), **settings))
    assert lost.diverged == "epoch 20: gradients are NaN or inf in fp16 at every loss scale"
    assert same(student, whole)


@pytest.mark.survival("numbers")
def test_a_regressor_of_a_map_that_is_constant_has_no_information_and_harms_no_result(tiny, tmp_path):
    network = WideResNet(10, 2)
    torch.nn.init.constant_(network.bn1.bias, -100.0)  # the ReLU after it is 0 everywhere
    checkpoint.save_weights(tmp_path / "dead.safetensors", network.state_dict(), {})
    teacher = {"teacher": str(tmp_path / "dead.safetensors")}
    (run,) = train(tiny("a", "fitnet", fitnet=FitNetOptions(tap=("stem", "group3")), **teacher))
    assert list(run.history[-1].information) == ["fitnet at stem"]


# --- the protocol


def test_the_learning_rate_drops_at_30_60_and_80_percent(tiny):
    used = []

    def note(step, *_):
        used.append([float(part["lr"]) for part in step.students[0].optimizer.param_groups])

    with after_each_step(note):
        train(tiny("a", "vid", epochs=10, batch_size=40))
    assert all(decayed == undecayed for decayed, undecayed in used)
    assert [rates[0] for rates in used] == pytest.approx([0.1] * 3 + [0.02] * 3 + [0.004] * 2 + [0.0008] * 2)


@pytest.mark.parametrize("epochs, drops", [(200, [60, 120, 160]), (1000, [300, 600, 800])])
def test_the_drops_of_the_published_lengths_are_at_whole_epochs(epochs, drops):
    rates = [learning_rate(TrainConfig(), epoch / epochs) for epoch in range(epochs)]
    assert [epoch for epoch in range(1, epochs) if rates[epoch] != rates[epoch - 1]] == drops


def test_other_milestones_and_factors_are_followed():
    config = TrainConfig(learning_rate=1.0, lr_decay=0.5, milestones=(0.5,))
    assert [learning_rate(config, share) for share in (0.0, 0.49, 0.5, 0.99)] == [1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    "epochs, evaluations, count",
    [(200, 50, 50), (1000, 50, 50), (8, 10, 8), (7, 3, 3), (1, 50, 1), (5, 1, 1), (10, 10, 10)],
)
def test_evaluations_are_evenly_spread_and_the_last_epoch_is_among_them(epochs, evaluations, count):
    config = TrainConfig(epochs=epochs, evaluations=evaluations)
    chosen = [done for done in range(epochs + 1) if is_evaluated(done, config)]
    assert len(chosen) == count and chosen[-1] == epochs
    gaps = {after - before for before, after in zip([0, *chosen], chosen)}
    assert max(gaps) - min(gaps) <= 1


def test_the_last_short_batch_is_trained_on_and_the_teacher_sees_each_batch_once_for_all_students(
    tiny, forwards
):
    first = train(tiny("a", "student", "kd", "at"))[0]
    assert first.steps == 2 * STEPS and first.train_images == 40
    teacher = [images for network, images in forwards if network.width == 2]
    assert teacher == [10] + [16, 16, 8] * 2 + [10], "its accuracy, two epochs, the sample for the regressors"
    students = [images for network, images in forwards if network.width == 1]
    assert students == ([16] * 6 + [8] * 3) * 2 + [10] * 3


def test_the_teacher_stays_as_it_was_loaded(tiny, teacher, forwards):
    train(tiny("a", "vid"))
    evaluated, teaching = dict.fromkeys(network for network, _ in forwards if network.width == 2)
    loaded = checkpoint.load_weights(teacher)[0]
    expected = frozen(evaluated, teaching.conv1.weight.dtype).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in evaluated.state_dict().items())
    assert all(torch.equal(value, expected[name]) for name, value in teaching.state_dict().items())
    for network in (teaching, evaluated):
        assert not network.training and not any(value.requires_grad for value in network.parameters())


def test_a_teacher_near_chance_is_warned_about_before_the_training_and_a_good_one_is_not(
    tiny, tmp_path, capsys
):
    warning = "warning: the teacher is hardly better than chance (10 %): are its classes in another order"
    train(tiny("good", "kd"))
    assert warning not in capsys.readouterr().err
    checkpoint.save_weights(tmp_path / "raw.safetensors", WideResNet(10, 2).state_dict(), {})
    (run,) = train(tiny("raw", "kd", teacher=str(tmp_path / "raw.safetensors")))
    said = capsys.readouterr().err
    assert said.index(f"raw.safetensors: {run.teacher_accuracy:.2f} % on validation") < said.index(warning)
    assert said.index(warning) < said.index("from the start") and run.teacher_accuracy < 15


def test_images_and_weights_are_channels_last_and_a_student_is_back_in_training_mode_after_an_evaluation(
    tiny, forwards
):
    layouts = []
    with after_each_step(
        lambda _, images, __: layouts.append(images.is_contiguous(memory_format=torch.channels_last))
    ):
        train(tiny("a", "student", evaluations=2))
    ((network, _), *_) = forwards
    assert layouts == [True] * 2 * STEPS
    assert network.conv1.weight.is_contiguous(memory_format=torch.channels_last) and network.training


def test_layers_above_the_hint_are_frozen_until_the_hint_is_learned(tiny, teacher):
    config = tiny("a", "fitnet", fitnet=FitNetOptions(schedule="two-stage", hint_share=0.5), weight_decay=0.1)
    network, taught = WideResNet(10, 1), checkpoint.load_network(teacher, 10, 2, 10)
    student = Student("fitnet", network, build("fitnet", config, network, taught), config, CPU)
    step, before = GroupStep(taught, [student], CPU, "fp32"), copy.deepcopy(dict(network.named_parameters()))
    images, labels = next(iter(EvalLoader(datasets.load("digits", "", "train").subset(2), 20)))

    def moved(progress):
        step.begin_epoch(progress)
        for _ in range(3):
            step(images, labels, 0.1)
        return {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}

    above = re.compile(r"fc\.|bn1\.|block3\.layer\.0\.(conv|bn2\.)")  # the tap lies behind block3.layer.0.bn1
    frozen_names = {name for name in before if above.match(name)}
    assert len(frozen_names) == 9 and moved(0.0) == set(before) - frozen_names
    assert moved(0.5) == set(before)


def test_a_hint_that_leaves_no_epoch_to_the_labels_is_refused(tiny):
    with pytest.raises(
        InputError, match="--fitnet-hint-share is 0.6, wanted a share that leaves one of the 2"
    ):
        train(tiny("a", "fitnet", fitnet=FitNetOptions(schedule="two-stage", hint_share=0.6)))


def test_no_teacher_is_trained_beside_students_of_a_given_one(tiny):
    train(tiny("a", "vid"))
    with pytest.raises(InputError, match=r"holds students of a teacher \(.*\) whose result is not there"):
        train(tiny("a", "teacher"))
    train(tiny("a", "kd"))


def test_the_same_run_in_another_folder_writes_the_same_file(tiny):
    (one,), (other,) = (train(tiny(name, "vid")) for name in "ab")
    assert one.weights_sha256 == other.weights_sha256


def test_settings_that_finished_runs_did_not_use_do_not_separate_results(tiny):
    train(tiny("a", "student", teacher_width=3))
    train(tiny("a", "vid", vid=VIDOptions(weight=3.0)))
    with pytest.raises(InputError, match="was made with vid = .*3.0.* but now the value is .*4.0"):
        train(tiny("a", "vid", vid=VIDOptions(weight=4.0), seed=1))


# --- what is left behind


def test_a_finished_run_leaves_its_result_and_weights_only_and_is_not_trained_again(tiny, forwards):
    config = tiny("a", "student", "kd+vid")
    first = train(config)
    assert files_in(config) == ["kd+vid-5-seed0.safetensors", "results.jsonl", "student-5-seed0.safetensors"]
    written = Path(config.out, results.FILE).read_bytes()
    forwards.clear()
    assert train(config) == first
    assert Path(config.out, results.FILE).read_bytes() == written and not forwards
    assert results.read(Path(config.out)) == (first, [])


def test_a_method_subset_or_seed_is_added_to_the_finished_ones(tiny):
    runs = [("student", 5, 0), ("vid", 5, 0), ("student", 6, 0), ("student", 5, 1)]
    for method, per_class, seed in runs:
        train(tiny("a", method, per_class=per_class, seed=seed))
    found, _ = results.read(Path(tiny("a", "student").out))
    assert [(run.method, run.per_class, run.seed) for run in found] == runs


@pytest.mark.parametrize("held_out, split, images", [(1, "validation", 40), (0, "test", 50)])
def test_the_accuracy_is_that_of_the_saved_weights_on_the_recorded_split(tiny, held_out, split, images):
    (result,) = train(tiny("a", "student", validation_per_class=held_out, epochs=4))
    assert (result.evaluated_on, result.train_images, result.per_class) == (split, images, 5)
    assert result.percent == pytest.approx(100 * 5 / 140)
    unseen = datasets.load("digits", "", "test")
    if held_out:
        unseen = datasets.load("digits", "", "train").subset(5).holdout(1)[1]
    network = checkpoint.load_network(f"{result.config['out']}/{result.weights}", 10, 1, 10)
    accuracy = evaluate(network, EvalLoader(unseen, 500), CPU, "fp32")
    assert accuracy == result.accuracy == result.history[-1].accuracy <= result.best_accuracy
    assert result.history[-1].epoch == 4


def test_the_information_of_each_regressor_is_that_of_the_saved_weights_on_the_evaluation_split(
    tiny, teacher, capsys
):
    config = tiny("a", "fitnet", fitnet=FitNetOptions(tap=("group1", "group2")))
    (result,) = train(config)
    student, taught = WideResNet(10, 1), checkpoint.load_network(teacher, 10, 2, 10)
    method, saved = build("fitnet", config, student, taught).eval(), weights_of(result).tensors
    prefix = checkpoint.METHOD_PREFIX
    student.load_state_dict(
        {name: v for name, v in saved.items() if not name.startswith(prefix)}, strict=False
    )
    method.load_state_dict(
        {name.removeprefix(prefix): v for name, v in saved.items() if name.startswith(prefix)}, strict=False
    )
    images, _ = next(iter(EvalLoader(datasets.load("digits", "", "train").subset(5).holdout(1)[1], 10)))
    expected = {}
    with torch.no_grad():
        ours, theirs = student.eval()(images).activated, taught(images).activated
        for tap, regressor in zip((1, 2), method.transfers["fitnet"].loss.regressors):
            error = (regressor(ours[tap]) - theirs[tap]).double().square().sum(dim=(0, 2, 3))
            spread = theirs[tap].double().var(dim=(0, 2, 3), unbiased=False) * error.numel()
            spread = spread * theirs[tap][:, 0].numel() / error.numel()
            expected[f"fitnet at group{tap}"] = [
                float(1 - error.sum() / spread.sum()),
                float(0.5 * (spread / error).log().mean()),
            ]
    recorded = result.history[-1].information
    assert recorded.keys() == expected.keys()
    assert all(recorded[name] == pytest.approx(values, rel=2e-3) for name, values in expected.items())
    poor = [name for name, (explained, _) in recorded.items() if explained < 0]
    assert poor, "after 6 steps"
    assert f"; worse than a constant: the regressor of {', '.join(poor)}\n" in capsys.readouterr().err


def test_learned_variances_are_in_the_history_per_tap_and_in_the_weights(tiny):
    (result,) = train(tiny("a", "vid", evaluations=2))
    first, last = (point.variances for point in result.history)
    assert list(last) == ["stem", "group1", "group2", "group3"] and first != last
    assert all(0 < least <= median <= most for least, median, most in last.values())
    saved = weights_of(result).tensors
    for number, channels in enumerate((32, 32, 64, 128)[1:], start=1):
        assert len(saved[f"{checkpoint.METHOD_PREFIX}transfers.vid.loss.raw_scales.{number}"]) == channels


def test_weights_say_what_they_are(tiny):
    config = tiny("a", "student", "vid")
    for result in train(config):
        metadata = weights_of(result).metadata
        train_set = datasets.load("digits", "", "train")
        assert metadata["architecture"] == "WRN-10-1" and metadata["dataset"] == "digits"
        assert (metadata["accuracy"], metadata["evaluated_on"]) == (result.accuracy, "validation")
        assert metadata["normalisation"] == {"mean": list(train_set.mean), "std": list(train_set.std)}
        settings = metadata["config"]
        assert settings.items() <= result.config.items()
        assert not settings.keys() & set(CIRCUMSTANCES), "no path of this machine"
        assert ("vid" in settings) == ("teacher_depth" in settings) == (result.method == "vid")
        content = Path(config.out, result.weights).read_bytes()
        assert result.weights_sha256 == hashlib.sha256(content).hexdigest()


def test_a_result_holds_the_whole_configuration_and_where_it_was_made(tiny):
    (result,) = train(tiny("a", "vid", vid=VIDOptions(weight=2.0)))
    assert set(result.config) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert result.config["method"] == ["vid"] and result.config["vid"] == {"variant": "paper", "weight": 2.0}
    assert [result.config[name] for name in ("protocol", "epochs", "batch_size")] == ["quick", 2, 16]
    assert result.environment["torch"] == torch.__version__
    assert {"device", "commit", "threads", "python"} <= result.environment.keys()
    assert result.images_per_second == pytest.approx(40 * 2 / result.seconds)


def test_the_parts_of_the_time_are_disjoint_and_add_up(tiny, monkeypatch):
    slept = {"training": 0.02, "preparation": 0.03, "evaluation": 0.04, "checkpoint": 0.05}

    def slow(owner, name, part):
        real = getattr(owner, name)

        def call(self, *values, **named):
            time.sleep(slept[part])
            return real(self, *values, **named)

        monkeypatch.setattr(owner, name, call)

    slow(GroupStep, "_run", "training")
    slow(GroupStep, "rehearsal", "preparation")
    slow(Group, "evaluate", "evaluation")
    slow(OutputFolder, "save", "checkpoint")
    began = time.perf_counter()
    (run,) = train(tiny("a", "student", evaluations=2, checkpoint_every="1epoch", profile=True))
    total = time.perf_counter() - began
    assert run.seconds >= 2 * STEPS * slept["training"]
    assert run.preparation_seconds >= slept["preparation"] + 7 * slept["training"], "7 profiled steps"
    assert run.evaluation_seconds >= 2 * slept["evaluation"]
    assert run.checkpoint_seconds >= 2 * slept["checkpoint"]
    parts = run.seconds + run.preparation_seconds + run.evaluation_seconds + run.checkpoint_seconds
    assert sum(slept.values()) < parts <= total


def test_a_part_inside_another_pauses_it_also_when_it_fails(monkeypatch):
    now = 0.0
    monkeypatch.setattr("fastvid.stopwatch.time.perf_counter", lambda: now)
    clock = Stopwatch(CPU)
    with pytest.raises(ZeroDivisionError), clock.part("training"):
        now = 1.0
        with clock.part("evaluation"):
            now = 11.0
            with clock.part("checkpoint"):
                now = 111.0
        now = 113.0
        with clock.part("evaluation"):
            now = 1113.0
            raise ZeroDivisionError
    now = 9999.0
    with clock.part("preparation"):
        now += 5
    assert clock.seconds == {"training": 3.0, "evaluation": 1010.0, "checkpoint": 100.0, "preparation": 5.0}


def test_the_loader_and_the_engine_are_said_and_recorded(tiny, capsys):
    for name in ("auto", "torch"):
        (result,) = train(tiny(name, "student", loader=name))
        assert f"batches by {describe(name)}, engine eager\n" in capsys.readouterr().err
        assert result.environment["loader"] == describe(name) and result.environment["engine"] == "eager"


def test_a_trained_network_can_teach_and_its_accuracy_is_recorded(tiny):
    (first,) = train(tiny("first", "vid"))
    path = f"{first.config['out']}/{first.weights}"
    student, kd = train(tiny("second", "student", "kd", teacher=path, teacher_width=1))
    assert kd.teacher_sha256 == first.weights_sha256 and kd.teacher_accuracy == first.accuracy
    assert student.teacher_sha256 is None and student.teacher_accuracy is None


def test_the_teacher_of_the_protocol_is_trained_like_a_student_of_its_own_size(tiny):
    (result,) = train(tiny("a", "teacher", teacher=None))
    tensors, metadata, *_ = weights_of(result)
    assert metadata["architecture"] == "WRN-10-2" and tensors["fc.weight"].shape == (10, 128)
    assert result.weights == "teacher-5-seed0.safetensors"
    assert result.teacher_sha256 is None and result.history[-1].transfer_loss == 0


def test_the_accuracy_of_the_teacher_is_measured_on_the_validation_split_of_the_same_subset(tiny, teacher):
    network = checkpoint.load_network(teacher, 10, 2, 10)
    recorded = {}
    for per_class in (10, 20):
        held_out = datasets.load("digits", "", "train").subset(per_class).holdout(5)[1]
        (result,) = train(tiny("a", "kd", per_class=per_class, validation_per_class=5, epochs=1))
        recorded[result.teacher_accuracy] = evaluate(network, EvalLoader(held_out, 500), CPU, "fp32")
    assert list(recorded) == list(recorded.values()) and len(recorded) == 2
