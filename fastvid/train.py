"""Train one group: students of one teacher, one subset and one seed, side by side, on the same batches.

The teacher sees each batch once for all students. The headline is the accuracy of the last epoch. The seconds reported are
those of training alone: start-up, evaluation and checkpoints are outside.
"""
from __future__ import annotations

import dataclasses
import hashlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from fastvid import checkpoint, datasets, results
from fastvid.config import TrainConfig
from fastvid.datasets import Data
from fastvid.engine import GroupStep, choose_device, evaluate
from fastvid.errors import InputError, Interrupted
from fastvid.loader import EvalLoader, describe, train_loader
from fastvid.plan import BatchPlan
from fastvid.progress import Progress, say
from fastvid.results import RunResult
from fastvid.run import Run, find_finished
from fastvid.wresnet import WideResNet

__all__ = ["TrainConfig", "train"]

EVAL_BATCH = 500
load_split = lru_cache(maxsize=2)(datasets.load)  # a grid trains many groups on the two splits of one data set


def train(config: TrainConfig) -> list[RunResult]:
    """Train every method of the config; each result is also a line of OUT/results.jsonl.

    Finished runs in OUT are not made again; interrupted ones go on where they stopped, with the same final bits on a CPU.
    Raises InputError for what the user can mend, and Interrupted after SIGINT or SIGTERM, when everything is saved.
    """
    request, config = config, config.resolved()
    device = choose_device(config.device)
    data = load_data(config)
    teacher, teacher_sha256 = load_teacher(config, data.train)

    with results.exclusive(results.open_folder(Path(config.out))):
        return _train_missing(request, data, teacher, teacher_sha256, device)


def _train_missing(request: TrainConfig, data: Data, teacher: WideResNet | None, teacher_sha256: str | None,
                   device: torch.device) -> list[RunResult]:
    """The runs of `request` that its output folder lacks, and the finished ones beside them."""
    config, out = request.resolved(), Path(request.out)
    found, notes = results.read(out)
    for note in notes:
        say(note)
    finished = find_finished(request, data, teacher_sha256, found)
    for name in config.method:
        if name in finished:
            say(f"{summary(finished[name])}; finished before")
    waiting = [dataclasses.replace(config, method=(name,)) for name in config.method if name not in finished]

    runs = [Run(one, data, teacher, teacher_sha256, device) for one in waiting]
    same_teacher = (r.teacher_accuracy for r in found if r.teacher_sha256 == teacher_sha256 and r.evaluated_on == "test")
    known = next(same_teacher, None) if data.evaluated_on == "test" else None
    for position in sorted({run.position for run in runs}):  # one group, unless a method joins interrupted ones
        group = [run for run in runs if run.position == position]
        train_group(group, config, data, teacher, device)
        if teacher is not None and known is None:
            known = evaluate(teacher, EvalLoader(data.evaluation, EVAL_BATCH, device=device), device, config.precision)
        for run in group:
            finished[run.method] = run.finish(group, known)
            say(summary(finished[run.method]))
    return [finished[name] for name in config.method]


def train_group(group: list[Run], config: TrainConfig, data: Data, teacher: WideResNet | None, device: torch.device) -> None:
    """The protocol: shuffled, augmented batches, steps at a falling learning rate, evaluations, until the last epoch."""
    plan = BatchPlan(len(data.train), config.batch_size, seed=config.seed)
    loader = train_loader(data.train, plan, backend=config.loader, device=device)
    test = EvalLoader(data.evaluation, EVAL_BATCH, device=device)
    step = GroupStep(teacher, [run.learner for run in group], device, config.precision)

    steps = config.epochs * plan.steps_per_epoch
    first_epoch, first_step = divmod(group[0].position, plan.steps_per_epoch)
    images_done = first_epoch * len(data.train) + first_step * config.batch_size
    title = f"{', '.join(run.method for run in group)} | {data.percent:.3g} % of {config.dataset}, seed {config.seed}"

    say(f"{title}: batches by {describe(config.loader)}")
    with stop_on_signal() as stop, closing(Progress(title, config.epochs * len(data.train), images_done)) as progress:
        last_save = time.monotonic()
        for epoch in range(first_epoch, config.epochs):
            started = time.perf_counter()
            done = epoch * plan.steps_per_epoch + first_step
            step.begin_epoch(epoch / config.epochs)
            for images, labels in loader.epoch(epoch, first_step):
                step(images, labels, learning_rate(config, done / steps))
                done += 1
                progress.advance(len(labels))
                if stop.is_set():
                    break
            first_step = 0
            epoch_is_over = done == (epoch + 1) * plan.steps_per_epoch
            losses = [run.learner.take_losses(len(data.train)) for run in group] if epoch_is_over else []  # host sync: once per epoch
            for run in group:
                run.seconds += time.perf_counter() - started
            if epoch_is_over and is_evaluated(epoch, config):
                for run, means in zip(group, losses):
                    run.evaluate(epoch + 1, means, test)
                progress.status("  ".join(f"{run.method} {run.history[-1].accuracy:.1f}" for run in group))
            if stop.is_set() or epoch + 1 == config.epochs or time.monotonic() - last_save > 60 * config.checkpoint_minutes:
                for run in group:
                    run.save(done)
                last_save = time.monotonic()
            if stop.is_set():
                raise Interrupted(f"stopped after step {done:,} of {steps:,}, all is saved in {config.out}: "
                                  "the same command goes on from there")


def learning_rate(config: TrainConfig, progress: float) -> float:
    """At this share of the training: the base rate, times lr_decay for each milestone reached."""
    return config.learning_rate * config.lr_decay ** sum(progress >= milestone for milestone in config.milestones)


def is_evaluated(epoch: int, config: TrainConfig) -> bool:
    """Whether epoch number `epoch` (from 0) ends with one of the evenly spread evaluations. The last one does."""
    count = min(config.evaluations, config.epochs)
    return (epoch + 1) * count // config.epochs > epoch * count // config.epochs


def load_data(config: TrainConfig) -> Data:
    """Raises InputError when the data set is missing or damaged, or the subset smaller than a batch."""
    whole = load_split(config.dataset, config.data, "train", download=config.download)
    subset = whole if config.per_class is None else whole.subset(config.per_class)
    percent, sha256 = 100 * len(subset) / len(whole), whole.sha256()
    if config.validation_per_class:
        subset, evaluation = subset.holdout(config.validation_per_class)
    else:
        evaluation = load_split(config.dataset, config.data, "test")
        sha256 = hashlib.sha256(f"{sha256} {evaluation.sha256()}".encode()).hexdigest()
    if config.per_class and percent == 100:
        raise InputError(f"--per-class {config.per_class} is the whole training split of {config.dataset}: leave it out")
    if config.batch_size > len(subset):
        raise InputError(f"a batch of {config.batch_size} is larger than the training subset of {len(subset)} images: "
                         f"set --batch-size {len(subset)} or less, or take more images per class")
    return Data(subset, evaluation, "validation" if config.validation_per_class else "test", percent, sha256)


def load_teacher(config: TrainConfig, arrays: datasets.Arrays) -> tuple[WideResNet | None, str | None]:
    """(frozen teacher, SHA-256 of its file), or (None, None) when no method wants one. Raises InputError when it does not fit the data."""
    if not config.needs_teacher:
        return None, None
    if config.teacher is None:
        raise InputError(f"--method {','.join(config.method)} needs a teacher: add --teacher FILE, or make one with --method teacher")
    teacher = checkpoint.load_network(config.teacher, config.teacher_depth, config.teacher_width, len(arrays.class_names))
    _, metadata = checkpoint.load_weights(config.teacher)
    ours = {"normalisation": {"mean": list(arrays.mean), "std": list(arrays.std)}, "classes": list(arrays.class_names)}
    for name, value in ours.items():  # weights of other programs do not say
        if metadata.get(name, value) != value:
            raise InputError(f"{config.teacher} was trained with other {name} ({metadata[name]}) than {config.dataset} has: "
                             "take a teacher of this data set")
    return teacher, hashlib.sha256(Path(config.teacher).read_bytes()).hexdigest()


def summary(result: RunResult) -> str:
    """One line about a finished run."""
    text = (f"{result.method} | {result.percent:.3g} % of {result.dataset}, seed {result.seed}: {result.accuracy:.2f} % on "
            f"{result.evaluated_on} after the last epoch (best {result.best_accuracy:.2f}), {result.seconds:,.0f} s of training")
    variances = "; ".join(f"{tap} {low:.3g} to {high:.3g}" for tap, (low, _, high) in result.history[-1].variances.items())
    return f"{text}; variances {variances}" if variances else text


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; the handlers do nothing else, so no save is torn. Outside the main thread: never set."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
