"""Training end to end, on tiny networks and a few digits: 40 images, 3 steps per epoch with a last short batch of 8, 10 to evaluate on."""

import copy
import dataclasses
import hashlib
import itertools
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastvid import checkpoint, cli, datasets, results, signals
from fastvid.config import CIRCUMSTANCES, FitNetOptions, TrainConfig, VIDOptions
from fastvid.datasets.digits import TRAIN_PER_CLASS
from fastvid.engine import GroupStep, evaluate
from fastvid.errors import InputError, Interrupted
from fastvid.learner import Learner
from fastvid.loader import EvalLoader, describe
from fastvid.methods import build, vid
from fastvid.run import Run
from fastvid.train import is_evaluated, learning_rate, train
from fastvid.wresnet import WideResNet, frozen

CPU = torch.device("cpu")
STEPS = 3  # per epoch
TINY = {
    "device": "cpu",
    "dataset": "digits",
    "per_class": 5,
    "validation_per_class": 1,
    "batch_size": 16,
    "epochs": 2,
    "evaluations": 1,
    "teacher_depth": 10,
    "teacher_width": 2,
    "student_depth": 10,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Weights of a WRN-10-2, random but for its last layer, which is fitted to digits; the width tells it from a student."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(1)
    network, (images, labels) = (
        WideResNet(10, 2),
        next(iter(EvalLoader(datasets.load("digits", "", "train").subset(5), 50))),
    )
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of this one batch
        features = network(images).activated[-1].mean(dim=(2, 3))
        network.fc.weight.copy_(torch.linalg.lstsq(features, 10.0 * F.one_hot(labels).float()).solution.T)
    checkpoint.save_weights(path, network.state_dict(), {})
    return str(path)


@pytest.fixture
def tiny(tmp_path, teacher):
    """tiny("a", "vid", "kd", seed=1): the config of a group whose output folder is tmp_path/a."""
    return lambda out, *methods, **settings: TrainConfig(
        **TINY | {"method": methods, "teacher": teacher, "out": str(tmp_path / out)} | settings
    )


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(config, after=n): train until SIGINT arrives during step n, counted from this start; returns the message."""
    real = GroupStep.__call__

    def run(config, after):
        steps = itertools.count(1)

        def step(self, *batch, **settings):
            real(self, *batch, **settings)
            if next(steps) == after:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(GroupStep, "__call__", step)
            with pytest.raises(Interrupted) as stopped:
                train(config)
        return str(stopped.value)

    return run


@pytest.fixture
def forwards():
    """Every forward pass of a WideResNet while the test runs, as (network, images)."""
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: (
            seen.append((module, len(inputs[0]))) if isinstance(module, WideResNet) else None
        )
    )
    yield seen
    hook.remove()


def bits(result):
    """SHA-256 of the final tensors, the method's included."""
    return weights_of(result).metadata["tensors_sha256"]


def weights_of(result):
    return checkpoint.load_weights(f"{result.config['out']}/{result.weights}")


def files_in(config):
    return sorted(path.name for path in Path(config.out).iterdir() if not path.name.startswith("."))


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
    assert [result.group for result in together] == [["student", "kd+at", "fitnet", "vid"]] * 4
    for result in together:
        (alone,) = train(tiny(f"alone-{result.method}", result.method))
        assert bits(alone) == bits(result), result.method
        assert alone.history == result.history and alone.accuracy == result.accuracy


def test_students_start_from_the_same_weights_whatever_their_method(tiny):
    results_of_one_step = train(tiny("a", "student", "vid", learning_rate=0.0, epochs=1))
    student, vid = (weights_of(result).tensors for result in results_of_one_step)
    trained = [name for name in student if not re.search("running|num_batches", name)]
    assert all(torch.equal(student[name], vid[name]) for name in trained)


def test_neither_the_method_nor_the_loader_changes_a_batch(tiny, monkeypatch):
    seen, real = {}, GroupStep.__call__

    def step(self, images, labels, *rest):
        seen[name].append(hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest())
        real(self, images, labels, *rest)

    monkeypatch.setattr(GroupStep, "__call__", step)
    for name in ("student", "vid", "kd+at", "torch"):
        seen[name] = []
        train(tiny(name, "student", loader="torch") if name == "torch" else tiny(name, name))
    assert len(seen["student"]) == 2 * STEPS and all(batches == seen["student"] for batches in seen.values())


# --- interrupted


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(1, id="first-step"),
        pytest.param(STEPS, id="last-step-of-an-epoch"),
        pytest.param(STEPS + 2, id="within-an-epoch"),
        pytest.param(4 * STEPS, id="very-last-step"),
    ],
)
def test_an_interrupted_group_goes_on_to_the_same_bits(tiny, interrupted, after):
    methods = "student", "fitnet", "vid"
    settings = {"epochs": 4, "evaluations": 2, "fitnet": FitNetOptions(schedule="two-stage", hint_share=0.5)}
    whole, config = train(tiny("whole", *methods, **settings)), tiny("broken", *methods, **settings)
    message = interrupted(config, after)
    assert (
        message
        == f"stopped after step {after} of {4 * STEPS}, all is saved in {config.out}: the same command goes on from there"
    )
    assert files_in(config) == [
        "fitnet-5-seed0.resume",
        "results.jsonl",
        "student-5-seed0.resume",
        "vid-5-seed0.resume",
    ]
    resumed = train(config)
    for one, other in zip(resumed, whole):
        assert bits(one) == bits(other), one.method
        assert one.history == other.history and one.steps == other.steps == 4 * STEPS
        assert [point.epoch for point in one.history] == [2, 4]


def test_a_run_that_is_interrupted_twice_goes_on_too_and_its_seconds_add_up(tiny, interrupted):
    (whole,), config = train(tiny("whole", "vid")), tiny("broken", "vid")
    interrupted(config, after=2)
    before = checkpoint.load_state(f"{config.out}/vid-5-seed0.resume")
    assert "step 3 of 6" in interrupted(config, after=1)
    (resumed,) = train(config)
    assert bits(resumed) == bits(whole)
    assert resumed.seconds > before["seconds"] > 0


def test_a_method_added_to_an_interrupted_group_is_trained_beside_it(tiny, interrupted):
    whole = train(tiny("whole", "student", "vid"))
    interrupted(tiny("broken", "student"), after=2)
    resumed = train(tiny("broken", "student", "vid"))
    assert [result.method for result in resumed] == ["student", "vid"]
    assert list(map(bits, resumed)) == list(map(bits, whole))
    assert [result.group for result in resumed] == [["student"], ["vid"]], "they did not share their batches"


@pytest.mark.survival("wrong but well-formed")
@pytest.mark.parametrize(
    "change, phrase",
    [
        pytest.param(
            {"learning_rate": 0.05},
            "was made with learning_rate = 0.1, but now it is 0.05: give the old settings, another --out",
            id="setting",
        ),
        pytest.param(
            {"vid": VIDOptions(weight=1.0)},
            "was made with vid = .*10.0.*, but now it is .*1.0",
            id="setting-of-a-method",
        ),
        pytest.param(
            {"teacher": "another"},
            "was made with another teacher: give the old settings, another --out, or delete the file",
            id="teacher",
        ),
    ],
)
def test_a_resume_state_of_another_configuration_is_refused_and_kept(
    tiny, interrupted, tmp_path, change, phrase
):
    interrupted(tiny("a", "vid"), after=1)
    resume = tmp_path / "a" / "vid-5-seed0.resume"
    before = resume.read_bytes()
    if "teacher" in change:
        checkpoint.save_weights(tmp_path / "another.safetensors", WideResNet(10, 2).state_dict(), {})
        change = {"teacher": str(tmp_path / "another.safetensors")}
    with pytest.raises(InputError, match=f"{resume} {phrase}"):
        train(tiny("a", "vid", **change))
    assert resume.read_bytes() == before


@pytest.mark.parametrize(
    "damage, phrase",
    [
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a readable torch file", id="cut"
        ),
        pytest.param(
            lambda path: path.write_bytes(b"nothing of ours"), "not a readable torch file", id="garbage"
        ),
        pytest.param(lambda path: path.write_bytes(b""), "not a readable torch file", id="empty"),
        pytest.param(
            lambda path: torch.save({"epoch": 3}, path),
            "is no resume state of this version .*: delete it",
            id="another-state",
        ),
        pytest.param(
            lambda path: torch.save(torch.ones(3), path),
            "is no resume state of this version .*: delete it",
            id="a-tensor",
        ),
        pytest.param(
            lambda path: torch.save(checkpoint.load_state(path) | {"learner": {}}, path),
            "is no resume state of this version",
            id="parts-missing",
        ),
        pytest.param(
            lambda path: torch.save(checkpoint.load_state(path) | {"position": math.inf}, path),
            "is no resume state of this version",
            id="no-position",
        ),
        pytest.param(
            lambda path: torch.save(checkpoint.load_state(path) | {"seconds": math.nan}, path),
            "is no resume state of this version",
            id="no-seconds",
        ),
        pytest.param(
            lambda path: torch.save(checkpoint.load_state(path) | {"position": 1.5}, path),
            "is no resume state of this version",
            id="half-a-step",
        ),
        pytest.param(
            lambda path: torch.save(checkpoint.load_state(path) | {"seconds": -5.0}, path),
            "is no resume state of this version",
            id="seconds-before-zero",
        ),
        pytest.param(
            lambda path: torch.save(with_momenta(path, lambda momentum: momentum.to(torch.complex64)), path),
            "is no resume state of this version",
            id="momenta-of-another-type",
        ),
        pytest.param(
            lambda path: torch.save(with_momenta(path, lambda momentum: momentum.to_sparse()), path),
            "is no resume state of this version",
            id="sparse-momenta",
        ),
        pytest.param(
            lambda path: torch.save(with_momenta(path, lambda _: torch.ones(3)), path),
            "is no resume state of this version",
            id="momenta-of-another-shape",
        ),
        pytest.param(
            lambda path: torch.save(without_a_momentum(checkpoint.load_state(path)), path),
            "is no resume state of this version",
            id="a-momentum-missing",
        ),
    ],
)
def test_a_resume_state_that_cannot_be_read_is_named_with_the_remedy(
    tiny, interrupted, tmp_path, damage, phrase
):
    interrupted(tiny("a", "vid"), after=1)
    resume = tmp_path / "a" / "vid-5-seed0.resume"
    damage(resume)
    with pytest.raises(InputError, match=f"{resume}:? {phrase}"):
        train(tiny("a", "vid"))


def with_momenta(path, change):
    state = checkpoint.load_state(path)
    state["learner"]["momenta"] = {
        name: change(momentum) for name, momentum in state["learner"]["momenta"].items()
    }
    return state


def without_a_momentum(state):
    state["learner"]["momenta"].popitem()
    return state


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda momentum: momentum.contiguous(), id="another-layout"),
        pytest.param(
            lambda momentum: torch.empty(2 * momentum.numel())[::2].view(momentum.shape).copy_(momentum),
            id="with-gaps",
        ),
    ],
)
def test_how_a_momentum_lies_in_the_file_does_not_matter(tiny, interrupted, change):
    (whole,) = train(tiny("whole", "vid"))
    config = tiny("a", "vid")
    interrupted(config, after=2)
    path = Path(config.out, "vid-5-seed0.resume")
    torch.save(with_momenta(path, change), path)
    (run,) = train(config)
    assert bits(run) == bits(whole) and run.history == whole.history


def test_a_momentum_that_is_one_number_in_memory_is_not_written_through(tiny, interrupted):
    config = tiny("a", "vid")
    interrupted(config, after=1)
    path = Path(config.out, "vid-5-seed0.resume")
    torch.save(with_momenta(path, lambda momentum: torch.zeros(1).expand(momentum.shape)), path)
    (run,) = train(config)
    assert run.steps == 2 * STEPS


@pytest.mark.parametrize(
    "harm, said", [(Path.unlink, "are gone"), (lambda path: path.write_bytes(b"x"), "are not what they were")]
)
def test_a_finished_run_whose_weights_are_lost_or_changed_is_told(harm, said, tiny, capsys):
    config = tiny("a", "student")
    (run,) = train(config)
    harm(Path(config.out, run.weights))
    assert train(config) == [run]
    told = f"{run.weights} {said}: the result stands; to make them again, take its line out of results.jsonl"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_the_command_stops_on_a_signal_says_how_to_go_on_and_does(tiny, number):
    config = tiny("broken", "student", epochs=12, checkpoint_every="1epoch")
    resume = Path(config.out, "student-5-seed0.resume")
    with subprocess.Popen(
        [sys.executable, "-m", "fastvid", *arguments(config)], stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not resume.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # it appears after the first epoch
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 128 + number
    message = rf"fastvid: stopped after step (\d+) of 36, all is saved in {config.out}: the same command goes on from there"
    assert STEPS <= int(re.fullmatch(message, errors[-1])[1]) < 36
    assert "Traceback" not in "".join(errors) and results.read(Path(config.out)) == ([], [])

    assert cli.main(arguments(config)) == 0
    ((resumed,), _), (whole,) = results.read(Path(config.out)), train(tiny("whole", "student", epochs=12))
    assert bits(resumed) == bits(whole) and not resume.exists()


@pytest.mark.parametrize("where", ["evaluation", "preparation"])
def test_a_signal_in_work_that_changes_nothing_is_followed_at_once_and_the_work_made_up_for(
    tiny, monkeypatch, where
):
    (whole,), config = train(tiny("whole", "vid", evaluations=2)), tiny("broken", "vid", evaluations=2)
    count, step, iterate = itertools.count(1), GroupStep.__call__, EvalLoader.__iter__

    def prepare(self, *batch):
        if next(count) == STEPS + 2:
            with signals.leaving_at_once():
                signal.raise_signal(signal.SIGINT)
            pytest.fail("the handler did not raise")
        step(self, *batch)

    def evaluate_until_the_signal(self):
        yield next(iterate(self))
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the handler did not raise")

    with monkeypatch.context() as patch:
        target = (
            (GroupStep, "__call__", prepare)
            if where == "preparation"
            else (EvalLoader, "__iter__", evaluate_until_the_signal)
        )
        patch.setattr(*target)
        with pytest.raises(
            Interrupted, match=f"stopped after step {STEPS + (where == 'preparation')} of {2 * STEPS}"
        ):
            train(config)
    (resumed,) = train(config)
    assert bits(resumed) == bits(whole) and resumed.history == whole.history and len(whole.history) == 2


def test_a_signal_while_the_last_state_is_saved_is_followed_too(tiny, monkeypatch):
    config, save = tiny("a", "student"), Run.save

    def save_and_signal(self, position):
        save(self, position)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a second one disturbs nothing

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save_and_signal)
        with pytest.raises(Interrupted, match=f"stopped after step {2 * STEPS} of {2 * STEPS}") as caught:
            train(config)
    assert caught.value.number == signal.SIGTERM
    assert bits(*train(config)) == bits(*train(tiny("whole", "student")))


@pytest.mark.parametrize(
    "every, saves",
    [("1epoch", [3, 6, 9, 12]), ("3epochs", [9, 12]), ("60min", [12]), ("0min", list(range(1, 13)))],
)
def test_the_state_is_saved_as_often_as_asked_for_and_that_changes_nothing(tiny, monkeypatch, every, saves):
    (whole,), seen, save = train(tiny("whole", "vid", epochs=4)), [], Run.save
    monkeypatch.setattr(Run, "save", lambda self, position: seen.append(position) or save(self, position))
    (run,) = train(tiny("saved", "vid", epochs=4, checkpoint_every=every))
    assert seen == saves and bits(run) == bits(whole) and run.history == whole.history


@pytest.mark.survival("wrong but well-formed")
def test_a_state_of_another_version_is_refused_and_one_of_another_commit_or_machine_told(
    tiny, interrupted, capsys
):
    config = tiny("a", "student")
    interrupted(config, after=1)
    path = Path(config.out, "student-5-seed0.resume")
    state = checkpoint.load_state(path)
    checkpoint.save_state(path, state | {"versions": state["versions"] | {"torch": "2.9.0"}})
    with pytest.raises(
        InputError,
        match="was made with torch = 2.9.0, but now it is .*: install that version again, or delete the file",
    ):
        train(config)
    (origin,) = state["origins"]
    checkpoint.save_state(
        path,
        state | {"origins": [origin | {"commit": "0123abc", "device": "NVIDIA H100", "engine": "graph"}]},
    )
    (run,) = train(config)
    told = (
        f"student was begun elsewhere, so other bits may come of it, and its result will say so: commit was 0123abc and is "
        f"{origin['commit']}, device was NVIDIA H100 and is {origin['device']}, engine was graph and is eager"
    )
    assert told in capsys.readouterr().err
    assert (
        run.environment["engine"] == "graph, then eager" and run.environment["threads"] == origin["threads"]
    )
    assert run.environment["commit"] == f"0123abc, then {origin['commit']}"


@pytest.mark.survival("wrong but well-formed")
def test_results_of_another_version_are_not_mixed_with_these(tiny, monkeypatch):
    train(tiny("a", "student"))
    monkeypatch.setattr("fastvid.__version__", "9.9")
    with pytest.raises(
        InputError,
        match="holds results of fastvid .*, and this is 9.9: install that version again, or give another --out",
    ):
        train(tiny("a", "kd"))


# --- numbers that are none


@pytest.mark.survival("numbers")
def test_a_diverging_method_is_named_with_step_and_tap_and_the_others_go_on_without_it(tiny):
    (whole,) = train(tiny("whole", "student"))
    with pytest.raises(
        InputError,
        match=r"vid diverged in step 1: the loss of vid at (stem|group\d) is (inf|nan); nothing of that",
    ):
        train(tiny("a", "student", "vid", vid=VIDOptions(weight=1e39)))
    assert files_in(tiny("a", "student")) == ["results.jsonl", "student-5-seed0.resume"]
    (student,) = train(tiny("a", "student"))
    assert bits(student) == bits(whole) and student.history == whole.history


@pytest.mark.survival("numbers")
def test_a_sum_of_losses_that_overflows_is_refused_and_leaves_no_result(tiny):
    config = tiny("a", "vid", vid=VIDOptions(weight=2e37), learning_rate=0.0)
    with pytest.raises(
        InputError,
        match="vid diverged by step 1: the losses of its epoch add up to .* and inf for the transfer",
    ):
        train(config)
    assert results.read(Path(config.out)) == ([], [])


@pytest.mark.survival("numbers")
def test_a_gradient_that_is_not_finite_is_named_with_its_parameter_and_the_last_good_state_stays(
    tiny, monkeypatch
):
    config, forward, count = (
        tiny("a", "student", epochs=4, checkpoint_every="1epoch"),
        WideResNet.forward,
        itertools.count(1),
    )

    def poisoned(self, images):
        output = forward(self, images)
        if self.training and next(count) > STEPS + 1:
            self.fc.bias.register_hook(lambda gradient: gradient * math.inf)
        return output

    with monkeypatch.context() as patch:
        patch.setattr(WideResNet, "forward", poisoned)
        with pytest.raises(
            InputError,
            match=f"student diverged in step {STEPS + 2}: the gradient of network.fc.bias is not finite",
        ):
            train(config)
    state = checkpoint.load_state(Path(config.out, "student-5-seed0.resume"))
    assert state["position"] == STEPS and all(
        value.isfinite().all() for value in state["learner"]["network"].values()
    )
    assert bits(*train(config)) == bits(*train(tiny("whole", "student", epochs=4)))


@pytest.mark.survival("numbers")
def test_gradients_that_fp16_cannot_hold_at_any_scale_end_the_run(tiny):
    (whole,) = train(tiny("whole", "student", precision="fp16", epochs=20))
    config = tiny("a", "student", "vid", precision="fp16", epochs=20, vid=VIDOptions(weight=1e30))
    with pytest.raises(
        InputError,
        match=r"vid diverged before step \d+: its gradients in fp16 are not finite at any scale of the loss",
    ):
        train(config)
    assert files_in(config) == ["results.jsonl", "student-5-seed0.resume"]
    (student,) = train(tiny("a", "student", precision="fp16", epochs=20))
    assert bits(student) == bits(whole)


@pytest.mark.survival("numbers")
def test_variances_at_their_floor_are_reported_once(tiny, monkeypatch, capsys):
    paper = vid.VARIANTS["paper"]
    monkeypatch.setitem(
        vid.VARIANTS, "paper", dataclasses.replace(paper, eps=1e-3, floor=0.0, initial_variance=1.001e-3)
    )
    train(tiny("a", "vid", evaluations=2, vid=VIDOptions(weight=1e-9)))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "floor" in line]
    assert line == (
        "vid: variances have come to their floor after epoch 1: 16 of 16 at stem, 32 of 32 at group1, 64 of 64 at group2, "
        "128 of 128 at group3"
    )


# --- the protocol


def test_the_learning_rate_drops_at_30_60_and_80_percent(tiny, monkeypatch):
    used, real = [], GroupStep.__call__

    def step(self, *batch):
        real(self, *batch)
        used.append([float(group["lr"]) for group in self.learners[0].optimizer.param_groups])

    monkeypatch.setattr(GroupStep, "__call__", step)
    train(tiny("a", "vid", epochs=10, batch_size=40))
    assert [len(set(rates)) for rates in used] == [1] * 10, (
        "decayed and undecayed parameters have the same rate"
    )
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
    chosen = [epoch for epoch in range(epochs) if is_evaluated(epoch, config)]
    assert len(chosen) == count and chosen[-1] == epochs - 1
    gaps = {after - before for before, after in zip([-1, *chosen], chosen)}
    assert max(gaps) - min(gaps) <= 1


def test_the_last_short_batch_is_trained_on_and_the_teacher_looks_once_per_batch_for_all_students(
    tiny, forwards
):
    first = train(tiny("a", "student", "kd", "vid"))[0]
    assert first.steps == 2 * STEPS and first.train_images == 40
    training = [images for network, images in forwards if network.width == 2]
    assert training == [16, 16, 8] * 2 + [10], "two epochs, and one look at the evaluation split"
    students = [images for network, images in forwards if network.width == 1]
    assert students == [16] * 6 + [8] * 3 + [16] * 6 + [8] * 3 + [10] * 3


def test_the_teacher_stays_as_it_was_loaded(tiny, teacher, forwards):
    train(tiny("a", "vid"))
    teaching, evaluated = dict.fromkeys(network for network, _ in forwards if network.width == 2)
    loaded = checkpoint.load_weights(teacher)[0]
    assert all(torch.equal(value, loaded[name]) for name, value in evaluated.state_dict().items())
    expected = frozen(evaluated, teaching.conv1.weight.dtype).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in teaching.state_dict().items())
    assert not any(
        network.training or parameter.requires_grad
        for network in (teaching, evaluated)
        for parameter in network.parameters()
    )


def test_images_and_weights_are_channels_last_and_a_student_is_back_in_training_mode_after_an_evaluation(
    tiny, forwards, monkeypatch
):
    layouts, real = [], GroupStep.__call__
    monkeypatch.setattr(
        GroupStep,
        "__call__",
        lambda self, images, *rest: (
            layouts.append(images.is_contiguous(memory_format=torch.channels_last))
            or real(self, images, *rest)
        ),
    )
    train(tiny("a", "student", evaluations=2))
    assert layouts == [True] * 2 * STEPS
    ((network, _), *_) = forwards
    assert network.conv1.weight.is_contiguous(memory_format=torch.channels_last) and network.training


def test_fp16_trains_on_the_cpu_to_finite_weights(tiny):
    for result in train(tiny("a", "vid", precision="fp16", clip_norm=5.0, epochs=1)):
        tensors = weights_of(result).tensors
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        assert all(math.isfinite(point.task_loss + point.transfer_loss) for point in result.history)
        assert result.config["precision"] == "fp16"


@pytest.mark.survival("numbers")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_diverging_run_ends_with_the_method_and_a_remedy_and_leaves_no_result(tiny, capsys, precision):
    config = tiny("a", "student", learning_rate=1e6, epochs=10, precision=precision)
    assert cli.main(arguments(config)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    what = r"(the loss of cross entropy is (nan|inf)|the gradient of network\S+ is not finite)"
    assert re.fullmatch(
        rf"fastvid: error: student diverged in step \d+: {what}; nothing of that was saved, "
        "earlier states are as they were: lower its weight or --learning-rate, set --clip-norm, or leave it out",
        line,
    )
    assert files_in(config) == ["results.jsonl"] and results.read(Path(config.out)) == ([], [])


def test_layers_above_the_hint_stand_still_until_the_hint_is_learned(tiny, teacher):
    config = tiny("a", "fitnet", fitnet=FitNetOptions(schedule="two-stage", hint_share=0.5), weight_decay=0.1)
    taught = checkpoint.load_network(teacher, 10, 2, 10)
    student = WideResNet(10, 1)
    learner = Learner("fitnet", student, build("fitnet", config, student, taught), config, CPU)
    step, before = GroupStep(taught, [learner], CPU, "fp32"), copy.deepcopy(dict(student.named_parameters()))
    images, labels = next(iter(EvalLoader(datasets.load("digits", "", "train").subset(2), 20)))

    def moved():
        return {
            name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])
        }

    above = {
        name
        for name in before
        if name.startswith(("fc.", "bn1.", "block3.layer.0.conv", "block3.layer.0.bn2."))
    }
    step.begin_epoch(0.0)
    for _ in range(3):
        step(images, labels, 0.1)
    assert len(above) == 9 and moved() == set(before) - above  # the tap lies behind block3.layer.0.bn1
    step.begin_epoch(0.5)
    for _ in range(3):
        step(images, labels, 0.1)
    assert moved() == set(before)


def test_a_hint_that_leaves_no_epoch_to_the_labels_is_refused(tiny):
    with pytest.raises(
        InputError,
        match="--fitnet-hint-share is 0.6, wanted a share that leaves one of the 2 epochs to the labels",
    ):
        train(tiny("a", "fitnet", fitnet=FitNetOptions(schedule="two-stage", hint_share=0.6)))


def test_no_teacher_is_trained_beside_students_of_a_given_one(tiny):
    train(tiny("a", "vid"))
    with pytest.raises(
        InputError, match=r"holds students of a teacher \(.*\) whose result is not there, .*: give that one"
    ):
        train(tiny("a", "teacher"))
    train(tiny("a", "kd"))


def test_the_same_run_in_another_folder_writes_the_same_file(tiny):
    (one,), (other,) = (train(tiny(name, "vid")) for name in "ab")
    assert one.weights_sha256 == other.weights_sha256


def test_settings_that_finished_runs_did_not_use_do_not_part_results(tiny):
    train(tiny("a", "student", teacher_width=3))
    (result,) = train(tiny("a", "vid", vid=VIDOptions(weight=3.0)))
    with pytest.raises(InputError, match="was made with vid = .*3.0.* but now it is .*4.0"):
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
    train(tiny("a", "student"))
    for config in (
        tiny("a", "student", "vid"),
        tiny("a", "student", per_class=6),
        tiny("a", "student", seed=1),
    ):
        train(config)
    found, _ = results.read(Path(config.out))
    assert [(one.method, one.per_class, one.seed) for one in found] == [
        ("student", 5, 0),
        ("vid", 5, 0),
        ("student", 6, 0),
        ("student", 5, 1),
    ]


@pytest.mark.parametrize("held_out, split, images", [(1, "validation", 40), (0, "test", 50)])
def test_the_accuracy_is_that_of_the_saved_weights_on_the_recorded_split(tiny, held_out, split, images):
    (result,) = train(tiny("a", "student", validation_per_class=held_out, epochs=4))
    assert (result.evaluated_on, result.train_images, result.per_class) == (split, images, 5)
    assert result.percent == pytest.approx(100 * 5 / TRAIN_PER_CLASS)
    first_five = datasets.load("digits", "", "train").subset(5)
    unseen = first_five.holdout(1)[1] if held_out else datasets.load("digits", "", "test")
    network = checkpoint.load_network(f"{result.config['out']}/{result.weights}", 10, 1, 10)
    assert (
        evaluate(network, EvalLoader(unseen, 500), CPU, "fp32")
        == result.accuracy
        == result.history[-1].accuracy
    )
    assert result.best_accuracy >= result.accuracy and result.history[-1].epoch == 4


@pytest.mark.parametrize(
    "variant, taps, first, floor",
    [
        ("paper", ["stem", "group1", "group2", "group3"], 0.3, 1.0),
        ("repdistiller", ["group1", "group2", "group3"], 5.0, 0.0),
    ],
)
def test_learned_variances_are_in_the_history_per_tap_and_in_the_weights(tiny, variant, taps, first, floor):
    (result,) = train(tiny("a", "vid", vid=VIDOptions(variant=variant, weight=10.0), evaluations=2))
    tensors = weights_of(result).tensors
    recorded = result.history[-1].variances
    assert list(recorded) == taps
    for number, tap in enumerate(taps):
        raw = tensors[f"{checkpoint.METHOD_PREFIX}transfers.vid.loss.raw_scales.{number}"]
        learned = F.softplus(raw) + max(1e-5, floor / len(raw))
        assert recorded[tap] == [float(f"{x:.4g}") for x in (learned.min(), learned.median(), learned.max())]
        assert (learned - first).abs().max() > 1e-4, "they were trained"
        assert f"{checkpoint.METHOD_PREFIX}transfers.vid.loss.regressors.{number}.last.weight" in tensors
    assert result.history[0].variances != recorded


def test_weights_say_what_they_are(tiny):
    config = tiny("a", "student", "vid")
    for result in train(config):
        metadata = weights_of(result).metadata
        assert metadata["architecture"] == "WRN-10-1" and metadata["dataset"] == "digits"
        assert (metadata["accuracy"], metadata["evaluated_on"]) == (result.accuracy, "validation")
        train_set = datasets.load("digits", "", "train")
        assert metadata["normalisation"] == {"mean": list(train_set.mean), "std": list(train_set.std)}
        settings = metadata["config"]
        assert settings.items() <= result.config.items() and not settings.keys() & set(
            CIRCUMSTANCES
        )  # no path of this machine
        assert (
            ("vid" in settings) == ("teacher_depth" in settings) == (result.method == "vid")
        )  # and nothing of other methods
        assert (
            result.weights_sha256 == hashlib.sha256(Path(config.out, result.weights).read_bytes()).hexdigest()
        )


def test_a_result_holds_the_whole_configuration_and_where_it_was_made(tiny):
    (result,) = train(tiny("a", "vid", vid=VIDOptions(weight=2.0)))
    assert set(result.config) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert result.config["method"] == ["vid"] and result.config["vid"] == {"variant": "paper", "weight": 2.0}
    assert (result.config["protocol"], result.config["epochs"], result.config["batch_size"]) == (
        "quick",
        2,
        16,
    )
    assert (
        result.environment["torch"] == torch.__version__
        and {"device", "commit", "threads", "python"} <= result.environment.keys()
    )
    assert result.seconds > 0 and result.images_per_second == pytest.approx(40 * 2 / result.seconds)


def test_which_loader_ran_is_said_and_recorded(tiny, capsys):
    for name in ("auto", "torch"):
        (result,) = train(tiny(name, "student", loader=name))
        assert f"batches by {describe(name)}, engine eager\n" in capsys.readouterr().err
        assert result.environment["loader"] == describe(name)


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
    assert result.teacher_sha256 is None and result.history[-1].transfer_loss == 0


def test_the_accuracy_of_the_teacher_is_measured_on_the_validation_split_of_the_same_subset(tiny, teacher):
    network = checkpoint.load_network(teacher, 10, 2, 10)
    whole = datasets.load("digits", "", "train")
    recorded = {}
    for per_class in (10, 20):
        held_out = whole.subset(per_class).holdout(5)[1]
        (result,) = train(tiny("a", "kd", per_class=per_class, validation_per_class=5, epochs=1))
        recorded[result.teacher_accuracy] = evaluate(network, EvalLoader(held_out, 500), CPU, "fp32")
    assert list(recorded) == list(recorded.values()) and len(recorded) == 2


def arguments(config):
    """The command line of a config that differs from TINY in plain settings only."""
    names = [*TINY, "out", "learning_rate", "checkpoint_every"]
    options = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    return ["train", "--method", ",".join(config.method), *options]
