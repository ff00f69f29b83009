"""Train one group: students of one teacher, one subset and one seed, on the same batches.

The teacher sees each batch once for all students. The reported accuracy is that of the last epoch. Training
seconds exclude start-up, compilation, evaluation and checkpoints; the last three are counted separately.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable

from fastvid import checkpoint, datasets, results, signals
from fastvid.config import TrainConfig
from fastvid.datasets import Data
from fastvid.device import choose_device, reset_peak_memory, tune
from fastvid.errors import InputError, Interrupted
from fastvid.folder import OutputFolder
from fastvid.group import EVAL_BATCH, Group, Setup
from fastvid.loader import EvalLoader, describe, train_loader
from fastvid.profiling import profile
from fastvid.progress import Progress, say
from fastvid.results import RunResult
from fastvid.step import GroupStep, choose_engine, evaluate
from fastvid.student import Student, new_student
from fastvid.wresnet import WideResNet

__all__ = ["TrainConfig", "train"]

Recorder = Callable[[Group, Student, str], RunResult]


def train(config: TrainConfig) -> list[RunResult]:
    """Train every method of `config`; each result is also a line of OUT/results.jsonl.

    Finished runs in OUT are not repeated. Interrupted runs resume where they stopped; on a CPU, resuming does
    not change the bits of the result. A student that diverges does not affect the others: its result has
    `diverged` and no accuracy.
    Raises InputError for an error that the user can correct, and Interrupted after SIGINT, SIGTERM or SIGHUP,
    when everything is saved.
    """
    folder = OutputFolder(config.out)
    with folder.claim(config) as free:
        if not free:
            raise InputError(
                f"another process trains this group in {config.out}: wait for it, or give another --out"
            )
        return train_group(config, folder)


def train_group(config: TrainConfig, folder: OutputFolder) -> list[RunResult]:
    """Like train, for a group that the caller has claimed."""
    setup = set_up(config, folder)
    finished = folder.finished(setup)
    for method in config.method:
        if method in finished:
            say(f"{summary(finished[method])}; finished before")
            folder.check_weights(finished[method])
    waiting = [method for method in config.method if method not in finished]
    begun = [method for method in folder.saved_students(setup.settings) if method not in finished]
    if set(begun) - set(waiting):
        raise InputError(
            f"{folder.resume_path(setup.settings)} holds the interrupted students {', '.join(begun)}: "
            "give all of them in --method, or delete the file"
        )
    if not begun:  # a process may have been killed after its last result and before deleting this file
        folder.resume_path(setup.settings).unlink(missing_ok=True)
    added = [method for method in waiting if method not in begun]  # train after `begun`, as a new group
    for methods in filter(None, (begun, added)):
        group = new_group(setup, methods)
        folder.load(group)
        diverged = fit(group, folder)
        for result in [*diverged, *folder.finish(group)]:
            finished[result.method] = result
            say(summary(result))
    return [finished[method] for method in config.method]


def set_up(config: TrainConfig, folder: OutputFolder) -> Setup:
    """Load data and teacher, choose device and engine. Raises InputError if they do not fit together."""
    settings = config.resolved()
    device = choose_device(settings.device)
    tune(device)
    data = load_data(settings)
    teacher, sha256 = load_teacher(settings, data.train)
    setup = Setup(config, settings, data, teacher, sha256, None, device, "eager")
    engine = choose_engine(settings.engine, device, settings.epochs * setup.plan.steps_per_epoch)
    return setup._replace(teacher_accuracy=_teacher_accuracy(setup, folder), engine=engine)


def new_group(setup: Setup, methods: list[str]) -> Group:
    """Students of these methods, with fresh weights."""
    students = []
    for method in methods:
        settings = dataclasses.replace(setup.settings, method=(method,))
        num_classes = len(setup.data.train.class_names)
        students.append(new_student(method, settings, num_classes, setup.teacher, setup.device))
    return Group(setup, students)


def fit(group: Group, folder: OutputFolder, record_divergence: Recorder | None = None) -> list[RunResult]:
    """Train the group to the last step: shuffled, augmented batches, SGD with a falling rate, evaluations.

    Returns the results of the students that diverged. The students that remain in the group are finished.
    record_divergence: (group, student, reason) -> result. Writes the result; by default into `folder`.
    """
    record_divergence = record_divergence or folder.record_divergence
    setup, clock, diverged = group.setup, group.clock, []
    settings, plan = setup.settings, setup.plan
    batches = train_loader(setup.data.train, plan, backend=settings.loader, device=setup.device)
    total_steps = settings.epochs * plan.steps_per_epoch
    step = GroupStep(
        setup.teacher, group.students, setup.device, settings.precision, setup.engine, plan.size(0), clock
    )
    schedule = SaveSchedule(settings, plan.steps_per_epoch)
    reset_peak_memory(setup.device)
    say(f"{group.title}: batches by {describe(settings.loader)}, engine {setup.engine}")
    step.begin_epoch(group.step // plan.steps_per_epoch / settings.epochs)
    if settings.profile and group.step < total_steps:
        say(profile(step, batches, folder.path))
    with signals.stop_on_signal() as stop, Progress(group.title, plan, settings.epochs, group.step) as bar:
        with clock.part("training"):
            while group.students:
                epoch, number = divmod(group.step, plan.steps_per_epoch)
                evaluating = number == 0 and is_evaluated(epoch, settings)
                stopping, saving = bool(stop), group.step == total_steps or schedule.is_due(group.step)
                if evaluating or saving or stopping:
                    diverged += [record_divergence(group, *found) for found in group.remove_diverged()]
                if evaluating:
                    with clock.part("evaluation"):
                        bar.status(group.evaluate(epoch, stop))
                    stopping = bool(stop)
                if saving or stopping:
                    with clock.part("checkpoint"):
                        folder.save(group)
                    schedule.saved()
                if stopping:
                    raise Interrupted(
                        f"stopped after step {group.step:,} of {total_steps:,}, everything is saved in "
                        f"{folder.path}: the same command resumes there",
                        stop.number,
                    )
                if group.step == total_steps:
                    break
                if number == 0:
                    step.begin_epoch(epoch / settings.epochs)
                    group.reset_losses()
                step(*batches.batch(epoch, number), learning_rate(settings, group.step / total_steps))
                group.step += 1
                bar.advance(plan.size(number))
    return diverged


class SaveSchedule:
    """Decides when the resume state is saved: every few minutes or epochs, as --checkpoint-every says."""

    def __init__(self, settings: TrainConfig, steps_per_epoch: int):
        self._seconds, self._epochs = settings.checkpoint_seconds, settings.checkpoint_epochs
        self._steps_per_epoch, self._saved_at = steps_per_epoch, time.monotonic()

    def is_due(self, step: int) -> bool:
        if self._epochs:
            return step > 0 and step % (self._epochs * self._steps_per_epoch) == 0
        return step > 0 and time.monotonic() - self._saved_at > self._seconds

    def saved(self) -> None:
        self._saved_at = time.monotonic()


def learning_rate(settings: TrainConfig, progress: float) -> float:
    """Learning rate at this share of the training: base rate times lr_decay for each milestone reached."""
    reached = sum(progress >= milestone for milestone in settings.milestones)
    return settings.learning_rate * settings.lr_decay**reached


def is_evaluated(epochs: int, settings: TrainConfig) -> bool:
    """Whether the group is evaluated after this many epochs: at even intervals, and after the last epoch."""
    count = min(settings.evaluations, settings.epochs)
    return epochs > 0 and epochs * count // settings.epochs > (epochs - 1) * count // settings.epochs


def load_data(settings: TrainConfig) -> Data:
    """Load the training subset and the images to evaluate on.

    Raises InputError if the data set is missing or damaged, or if the subset is smaller than a batch.
    """
    whole = datasets.load_once(settings.dataset, settings.data, "train", download=settings.download)
    subset = whole if settings.per_class is None else whole.subset(settings.per_class)
    percent, sha256 = 100 * len(subset) / len(whole), whole.sha256()
    if settings.validation_per_class:
        subset, evaluation = subset.holdout(settings.validation_per_class)
    else:
        evaluation = datasets.load_once(settings.dataset, settings.data, "test")
        sha256 = hashlib.sha256(f"{sha256} {evaluation.sha256()}".encode()).hexdigest()
    if settings.per_class and percent == 100:
        raise InputError(
            f"--per-class {settings.per_class} is the whole training split of {settings.dataset}: "
            "leave out this option"
        )
    if settings.batch_size > len(subset):
        raise InputError(
            f"a batch of {settings.batch_size} is larger than the training subset of {len(subset)} images: "
            f"set --batch-size {len(subset)} or less, or take more images per class"
        )
    evaluated_on = "validation" if settings.validation_per_class else "test"
    return Data(subset, evaluation, evaluated_on, percent, sha256)


def load_teacher(settings: TrainConfig, arrays: datasets.Arrays) -> tuple[WideResNet | None, str | None]:
    """(frozen teacher, SHA-256 of its file), or (None, None) if no method needs a teacher.

    Raises InputError if the teacher does not fit the settings or the data.
    """
    if not settings.needs_teacher:
        return None, None
    if settings.teacher is None:
        raise InputError(
            f"--method {','.join(settings.method)} needs a teacher: "
            "add --teacher FILE, or train a teacher with --method teacher"
        )
    weights = checkpoint.load_weights(settings.teacher)
    names, mean, std = list(arrays.class_names), list(arrays.mean), list(arrays.std)
    teacher = checkpoint.build_network(weights, settings.teacher_depth, settings.teacher_width, len(names))
    if not weights.verified:
        say(f"{settings.teacher} carries no checksum of fastvid: unverified, its SHA-256 is {weights.sha256}")
    wanted = {"normalisation": {"mean": mean, "std": std}, "classes": names}
    for name, value in wanted.items():  # weights of other programs have no metadata
        found = weights.metadata.get(name, value)
        if found != value:
            raise InputError(
                f"{settings.teacher} was trained with other {name} ({found}) than {settings.dataset} has: "
                "take a teacher of this data set"
            )
    return teacher, weights.sha256


def _teacher_accuracy(setup: Setup, folder: OutputFolder) -> float | None:
    """Accuracy of the teacher on the evaluation split: from an earlier result, or measured now."""
    if setup.teacher is None:
        return None
    for result in results.read(folder.path)[0]:
        same_split = result.evaluated_on == setup.data.evaluated_on == "test" or (
            (result.evaluated_on, result.per_class) == (setup.data.evaluated_on, setup.settings.per_class)
        )
        if result.teacher_sha256 == setup.teacher_sha256 and same_split:
            return result.teacher_accuracy
    loader = EvalLoader(setup.data.evaluation, EVAL_BATCH, device=setup.device)
    accuracy = evaluate(setup.teacher.to(setup.device), loader, setup.device, setup.settings.precision)
    say(f"teacher {setup.settings.teacher}: {accuracy:.2f} % on {setup.data.evaluated_on}")
    chance = 100 / len(setup.data.train.class_names)
    if accuracy < 1.5 * chance:
        say(
            f"warning: the teacher is hardly better than chance ({chance:.3g} %): are its classes in another "
            "order, or its images normalised otherwise?"
        )
    return accuracy


def summary(result: RunResult) -> str:
    """Return one line about a finished run."""
    text = f"{result.method} | {result.percent:.3g} % of {result.dataset}, seed {result.seed}: "
    if result.diverged:
        return f"{text}diverged in {result.diverged}"
    last = result.history[-1]
    text += (
        f"{result.accuracy:.2f} % on {result.evaluated_on} after the last epoch "
        f"(best {result.best_accuracy:.2f}), {result.seconds:,.0f} s of training beside "
        f"{result.preparation_seconds or 0:,.0f} s of compile and warm-up and "
        f"{result.evaluation_seconds or 0:,.0f} s of evaluation"
    )
    if result.peak_memory:
        text += f", peak memory {result.peak_memory / 2**20:,.0f} MiB"
    poor = [tap for tap, (explained, _) in last.information.items() if explained < 0]
    if poor:
        text += f"; worse than a constant: the regressor of {', '.join(poor)}"
    return text
