"""Train one group: students of one teacher, one subset and one seed, side by side, on the same batches.

The teacher sees each batch once for all students. The headline is the accuracy of the last epoch. The seconds reported are
those of training alone: start-up, evaluation and checkpoints are outside.
"""
from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch

from fastvid import checkpoint, datasets, distributed, progress, results
from fastvid.config import TrainConfig
from fastvid.datasets import Data
from fastvid.device import choose_device, peak_memory, reset_peak_memory, tune
from fastvid.distributed import ALONE, Ranks
from fastvid.engine import GroupStep, choose_engine, evaluate
from fastvid.errors import InputError, Interrupted, is_out_of_memory
from fastvid.loader import EvalLoader, describe, train_loader
from fastvid.plan import BatchPlan
from fastvid.profiling import profile
from fastvid.progress import Progress, say
from fastvid.results import RunResult
from fastvid.run import Run, find_finished, resume_file
from fastvid.wresnet import WideResNet

__all__ = ["TrainConfig", "train"]

EVAL_BATCH = 500
GRACE = 20  # seconds from a signal to the end of a rank that cannot answer it; torchrun kills after 30
load_split = lru_cache(maxsize=2)(datasets.load)  # a grid trains many groups on the two splits of one data set


def train(config: TrainConfig) -> list[RunResult]:
    """Train every method of the config; each result is also a line of OUT/results.jsonl.

    Finished runs in OUT are not made again; interrupted ones go on where they stopped, with the same final bits on a CPU.
    Under torchrun all processes train each student together: batch_size stays that of the whole step, of which every rank takes its
    part, and the gradients are averaged, so the learning rate stays too. Batch norms see a rank's part only; those of rank 0 are kept.
    Raises InputError for what the user can mend, Interrupted after SIGINT or SIGTERM, when everything is saved, and RankLost.
    """
    ranks = distributed.join()
    if not ranks.first:
        progress.mute()
    with results.exclusive(results.open_folder(Path(config.out))) if ranks.first else nullcontext():
        return train_group(config, ranks)


def train_group(request: TrainConfig, ranks: Ranks = ALONE) -> list[RunResult]:
    """As train, in an output folder that the caller holds, by these ranks."""
    config, out = request.resolved(), Path(request.out)
    device = choose_device(ranks.device(config.device))
    data = load_data(config)
    steps = config.epochs * BatchPlan(len(data.train), config.batch_size, seed=config.seed).steps_per_epoch
    engine = choose_engine(config.engine, device, steps, ranks)
    tune(device, ranks.local_world_size)
    teacher, teacher_sha256 = load_teacher(config, data.train)

    found, notes = results.read(out)
    for note in notes:
        say(note)
    finished = find_finished(request, data, teacher_sha256, found)
    for name in config.method:
        if name in finished:
            say(f"{summary(finished[name])}; finished before")
            if ranks.first:
                resume_file(dataclasses.replace(config, method=(name,))).unlink(missing_ok=True)  # of a start that ended just before this
    waiting = [dataclasses.replace(config, method=(name,)) for name in config.method if name not in finished]

    runs = [Run(one, data, teacher, teacher_sha256, device, engine, ranks) for one in waiting]
    ranks.barrier()  # the first one may write when all have read
    same_teacher = (r.teacher_accuracy for r in found if r.teacher_sha256 == teacher_sha256 and r.evaluated_on == "test")
    known = next(same_teacher, None) if data.evaluated_on == "test" else None
    for position in sorted({run.position for run in runs}):  # one group, unless a method joins interrupted ones
        group = [run for run in runs if run.position == position]
        train_side_by_side(group, config, data, teacher, device, engine, ranks)
        if ranks.first:
            if teacher is not None and known is None:
                known = evaluate(teacher.to(device), EvalLoader(data.evaluation, EVAL_BATCH, device=device), device, config.precision)
            for run in group:
                finished[run.method] = run.finish(group, known)
                say(summary(finished[run.method]))
        finished = ranks.from_first(finished)
    return [finished[name] for name in config.method]


def train_side_by_side(group: list[Run], config: TrainConfig, data: Data, teacher: WideResNet | None, device: torch.device,
                       engine: str, ranks: Ranks) -> None:
    """The protocol: shuffled, augmented batches, steps at a falling learning rate, evaluations, until the last epoch."""
    plan = BatchPlan(len(data.train), config.batch_size, seed=config.seed, rank=ranks.rank, world_size=ranks.world_size)
    loader = train_loader(data.train, plan, backend=config.loader, device=device)
    test = EvalLoader(data.evaluation, EVAL_BATCH, device=device)
    reset_peak_memory(device)

    steps = config.epochs * plan.steps_per_epoch
    first_epoch, first_step = divmod(group[0].position, plan.steps_per_epoch)
    images_done = first_epoch * len(data.train) + first_step * config.batch_size
    title = f"{', '.join(run.method for run in group)} | {data.percent:.3g} % of {config.dataset}, seed {config.seed}"

    say(f"{title}: batches by {describe(config.loader)}, engine {engine}" + (f", {ranks.world_size} ranks" if ranks.world_size > 1 else ""))
    with stop_on_signal(ranks) as stop, naming_what_does_not_fit(group, config, device), distributed.noticing_loss(ranks), \
            ExitStack() as stack:
        step = GroupStep(teacher, [run.learner for run in group], device, config.precision, engine, ranks)
        if config.profile and first_epoch < config.epochs:
            say(profile(step, loader, first_epoch, Path(config.out) if ranks.first else None))
            for run in group:
                run.preparation_seconds += step.preparation_seconds
        bar = stack.enter_context(closing(Progress(title, config.epochs * len(data.train), images_done)))
        last_save = time.monotonic()
        for epoch in range(first_epoch, config.epochs):
            started, prepared = time.perf_counter(), step.preparation_seconds
            done = epoch * plan.steps_per_epoch + first_step
            step.begin_epoch(epoch / config.epochs, fresh=first_step == 0)
            first_step = 0
            for batch in loader.epoch(epoch, done % plan.steps_per_epoch):
                images = plan.global_size(done % plan.steps_per_epoch)
                step(*batch, learning_rate(config, done / steps), ranks.world_size * len(batch.labels) / images)
                done += 1
                bar.advance(images)
                if done % ranks.steps_between_questions == 0 and ranks.any(stop.is_set()):
                    break
            epoch_is_over = done == (epoch + 1) * plan.steps_per_epoch
            evaluating = epoch_is_over and is_evaluated(epoch, config)
            saving = epoch + 1 == config.epochs or ranks.any(time.monotonic() - last_save > 60 * config.checkpoint_minutes)
            if evaluating or saving or device.type == "cpu":  # a GPU is waited for only then
                losses = [run.learner.losses(len(data.train), ranks) for run in group]
            preparing = step.preparation_seconds - prepared
            for run in group:
                run.seconds += time.perf_counter() - started - preparing
                run.preparation_seconds += preparing
            if evaluating and ranks.first:
                for run, means in zip(group, losses):
                    run.evaluate(epoch + 1, means, step, test)
                bar.status("  ".join(f"{run.method} {run.history[-1].accuracy:.1f}" for run in group))
            stopping = ranks.any(stop.is_set())
            if saving or stopping:
                for run in group:
                    run.learner.losses(len(data.train), ranks)  # what is not finite is not saved
                    run.save(done)
                last_save = time.monotonic()
            if stopping:
                raise Interrupted(f"stopped after step {done:,} of {steps:,}, all is saved in {config.out}: "
                                  "the same command goes on from there")


@contextmanager
def naming_what_does_not_fit(group: list[Run], config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Turn an exhausted memory into an InputError that names batch, precision and peak."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory: a batch of {config.batch_size} in {config.precision} for {', '.join(run.method for run in group)} does not "
            f"fit on {device} (peak {(peak_memory(device) or 0) / 2**20:,.0f} MiB): set a smaller --batch-size or train fewer methods at "
            f"once; what was saved in {config.out} is untouched") from error


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
    if result.preparation_seconds is not None:
        text += f" beside {result.preparation_seconds:,.0f} s of warm-up and {result.evaluation_seconds:,.0f} s of evaluation"
    if result.peak_memory:
        text += f", peak memory {result.peak_memory / 2**20:,.0f} MiB"
    variances = "; ".join(f"{tap} {low:.3g} to {high:.3g}" for tap, (low, _, high) in result.history[-1].variances.items())
    return f"{text}; variances {variances}" if variances else text


@contextmanager
def stop_on_signal(ranks: Ranks = ALONE) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; the handlers do nothing else, so no save is torn. Outside the main thread: never set.

    Among several ranks one that hangs on a lost peer never comes to look at the event. After GRACE seconds it ends all the same.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    end = threading.Timer(GRACE, _end_now)
    end.daemon = True

    def on_signal(*_) -> None:
        if ranks.world_size > 1 and not stop.is_set():
            end.start()
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        end.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_now() -> None:
    print("fastvid: the other ranks did not answer: start the same command again, it goes on from the last checkpoint", file=sys.stderr)
    os._exit(1)
