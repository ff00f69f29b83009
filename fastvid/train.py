"""Train one group: students of one teacher, one subset and one seed, side by side, on the same batches.

The teacher sees each batch once for all students. The headline is the accuracy of the last epoch. The seconds reported are
those of training alone: start-up, evaluation and checkpoints are outside.
"""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path

import torch

from fastvid import checkpoint, datasets, distributed, progress, results, signals
from fastvid.config import TrainConfig
from fastvid.datasets import Data
from fastvid.device import choose_device, peak_memory, reset_peak_memory, synchronize, tune
from fastvid.distributed import ALONE, Ranks
from fastvid.engine import GroupStep, choose_engine, evaluate
from fastvid.errors import InputError, Interrupted, is_out_of_memory
from fastvid.loader import EvalLoader, TrainLoader, describe, train_loader
from fastvid.plan import BatchPlan
from fastvid.profiling import profile
from fastvid.progress import Progress, say
from fastvid.results import RunResult
from fastvid.run import Run, find_finished, resume_file
from fastvid.wresnet import WideResNet

__all__ = ["TrainConfig", "train"]

EVAL_BATCH = 500
load_split = lru_cache(maxsize=2)(
    datasets.load
)  # a grid trains many groups on the two splits of one data set


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
            weights = out / finished[name].weights
            if not weights.is_file() or checkpoint.sha256_of(weights) != finished[name].weights_sha256:
                remedy = (
                    "put them back"
                    if name == "teacher"
                    else f"to make them again, take its line out of {results.FILE}"
                )
                say(
                    f"{weights} {'are not what they were' if weights.is_file() else 'are gone'}: the result stands; {remedy}"
                )
            if ranks.first:
                resume_file(dataclasses.replace(config, method=(name,))).unlink(
                    missing_ok=True
                )  # of a start that ended just before this
    waiting = [dataclasses.replace(config, method=(name,)) for name in config.method if name not in finished]

    runs = [Run(one, data, teacher, teacher_sha256, device, engine, ranks) for one in waiting]
    seen = [(run.method, run.position) for run in runs]
    if ranks.any(seen != ranks.from_first(seen)):  # asked by all, so the first one writes when all have read
        raise InputError(
            f"the ranks see different files in {out}: give an --out on a file system that all of them see"
        )
    same_teacher = (
        r.teacher_accuracy for r in found if r.teacher_sha256 == teacher_sha256 and r.evaluated_on == "test"
    )
    known = next(same_teacher, None) if data.evaluated_on == "test" else None
    for position in sorted(
        {run.position for run in runs}
    ):  # one group, unless a method joins interrupted ones
        group = [run for run in runs if run.position == position]
        train_side_by_side(group, config, data, teacher, device, engine, ranks)
        if ranks.first:
            if teacher is not None and known is None:
                known = evaluate(
                    teacher.to(device),
                    EvalLoader(data.evaluation, EVAL_BATCH, device=device),
                    device,
                    config.precision,
                )
            for run in group:
                finished[run.method] = run.finish(known)
                say(summary(finished[run.method]))
        finished = ranks.from_first(finished)
    return [finished[name] for name in config.method]


def train_side_by_side(
    group: list[Run],
    config: TrainConfig,
    data: Data,
    teacher: WideResNet | None,
    device: torch.device,
    engine: str,
    ranks: Ranks,
) -> None:
    """The protocol: shuffled, augmented batches, steps at a falling learning rate, evaluations, until the last epoch."""
    plan = BatchPlan(
        len(data.train), config.batch_size, seed=config.seed, rank=ranks.rank, world_size=ranks.world_size
    )
    loader = train_loader(data.train, plan, backend=config.loader, device=device)
    test = EvalLoader(data.evaluation, EVAL_BATCH, device=device)
    reset_peak_memory(device)
    on_cpu = device.type == "cpu"

    steps = config.epochs * plan.steps_per_epoch
    done = group[0].position
    epoch, first_step = divmod(done, plan.steps_per_epoch)
    images_done = epoch * len(data.train) + first_step * config.batch_size
    title = f"{', '.join(run.method for run in group)} | {data.percent:.3g} % of {config.dataset}, seed {config.seed}"

    say(
        f"{title}: batches by {describe(config.loader)}, engine {engine}"
        + (f", {ranks.world_size} ranks" if ranks.world_size > 1 else "")
    )
    with (
        signals.stop_on_signal(ranks.world_size > 1) as stop,
        naming_what_does_not_fit(group, config, device),
        distributed.noticing_loss(ranks),
        ExitStack() as stack,
    ):
        step = GroupStep(
            teacher, [run.learner for run in group], device, config.precision, engine, ranks, plan.size(0)
        )
        if config.profile and done < steps:
            with signals.leaving_at_once():
                say(profile(step, loader, epoch, Path(config.out) if ranks.first else None))
            for run in group:
                run.preparation_seconds += step.preparation_seconds
        bar = stack.enter_context(closing(Progress(title, config.epochs * len(data.train), images_done)))
        saved_at = time.monotonic()

        def is_overdue() -> bool:
            return time.monotonic() - saved_at > config.checkpoint_seconds

        def evaluate_if_due() -> None:
            """After some epochs. What a signal prevents, the next start makes up for."""
            epochs, rest = divmod(done, plan.steps_per_epoch)
            if not done or rest or not is_evaluated(epochs - 1, config):
                return
            losses = [run.learner.losses(len(data.train), ranks) for run in group]
            if ranks.first and not stop:
                with suppress(KeyboardInterrupt), signals.leaving_at_once():
                    for run, means in zip(group, losses):
                        run.evaluate(epochs, means, step, test)
                    bar.status("  ".join(f"{run.method} {run.history[-1].accuracy:.1f}" for run in group))

        if done < steps:
            for run in group:
                run.group = [other.method for other in group]
        evaluate_if_due()
        stopping = ranks.any(bool(stop))
        while done < steps and not stopping:
            epoch, first_step = divmod(done, plan.steps_per_epoch)
            started, prepared = time.perf_counter(), step.preparation_seconds
            step.begin_epoch(epoch / config.epochs, fresh=first_step == 0)
            for batch in loader.epoch(epoch, first_step):
                images = plan.global_size(done % plan.steps_per_epoch)
                try:
                    step(
                        *batch,
                        learning_rate(config, done / steps),
                        ranks.world_size * len(batch.labels) / images,
                    )
                except (
                    KeyboardInterrupt,
                    InputError,
                ):  # while it was prepared, which can take minutes; or a compiler got the signal
                    if stop:
                        break  # the step is not made
                    raise
                done += 1
                bar.advance(images)
                if (
                    on_cpu or done % ranks.steps_between_questions == 0
                ):  # the same on all ranks, as what follows
                    failed = on_cpu and any(run.learner.has_failed() for run in group)
                    if ranks.any(bool(stop) or is_overdue() or failed):
                        break
            epochs, rest = divmod(done, plan.steps_per_epoch)
            counted = config.checkpoint_epochs and not rest and epochs % config.checkpoint_epochs == 0
            stopping = ranks.any(bool(stop))
            pausing = done == steps or stopping or counted or ranks.any(is_overdue())
            evaluating = not rest and is_evaluated(epochs - 1, config)
            if pausing or evaluating:
                synchronize(device)  # a GPU is waited for only now
            preparing = step.preparation_seconds - prepared
            for run in group:
                run.seconds += time.perf_counter() - started - preparing
                run.preparation_seconds += preparing
            if pausing or evaluating or on_cpu:
                refuse_what_is_not_finite(group, step, loader, plan, done, ranks)
            evaluate_if_due()
            stopping = ranks.any(bool(stop))
            if pausing or stopping:
                for run in group:
                    run.save(done)
                saved_at = time.monotonic()
                stopping = ranks.any(bool(stop))  # also when the signal came while it was saved
        if stopping:
            said = f"stopped after step {done:,} of {steps:,}, all is saved in {config.out}: the same command goes on from there"
            raise Interrupted(said if ranks.first else "", stop.number or signal.SIGTERM)


def refuse_what_is_not_finite(
    group: list[Run], step: GroupStep, loader: TrainLoader, plan: BatchPlan, done: int, ranks: Ranks
) -> None:
    """Raises InputError when a step of this start had losses or gradients that are not finite. The other students are saved."""
    failed = [run for run in group if ranks.any(run.learner.has_failed())]
    if not failed:
        return
    for run in group:
        if run not in failed:
            run.save(done)
    run = failed[0]
    task, transfer = ranks.sum(run.learner.loss_sums).tolist()
    if ranks.any(run.learner.scale_is_lost()):
        raise InputError(
            f"{run.method} diverged before step {done + 1:,}: its gradients in fp16 are not finite at any scale of the loss; "
            "the weights stayed as they were: take --precision bf16, or lower its weight or --learning-rate"
        )
    if not ranks.any(run.learner.failed_steps() > 0):
        raise InputError(
            f"{run.method} diverged by step {done:,}: the losses of its epoch add up to {task} for the labels and {transfer} "
            "for the transfer; nothing of that was saved: lower its weight or --learning-rate"
        )
    good = done - run.learner.failed_steps()
    batch = next(iter(loader.epoch(*divmod(good, plan.steps_per_epoch))))
    reason = (
        step.explain_failure(run.learner, *batch)
        or "a loss or gradient was not finite, though not when this was tried again"
    )
    raise InputError(
        f"{run.method} diverged in step {good + 1:,}: {reason}; nothing of that was saved, earlier states are as they were: "
        "lower its weight or --learning-rate, set --clip-norm, or leave it out"
    )


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
            f"once; what was saved in {config.out} is untouched"
        ) from error


def learning_rate(config: TrainConfig, progress: float) -> float:
    """At this share of the training: the base rate, times lr_decay for each milestone reached."""
    return config.learning_rate * config.lr_decay ** sum(
        progress >= milestone for milestone in config.milestones
    )


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
        raise InputError(
            f"--per-class {config.per_class} is the whole training split of {config.dataset}: leave it out"
        )
    if config.batch_size > len(subset):
        raise InputError(
            f"a batch of {config.batch_size} is larger than the training subset of {len(subset)} images: "
            f"set --batch-size {len(subset)} or less, or take more images per class"
        )
    return Data(subset, evaluation, "validation" if config.validation_per_class else "test", percent, sha256)


def load_teacher(config: TrainConfig, arrays: datasets.Arrays) -> tuple[WideResNet | None, str | None]:
    """(frozen teacher, SHA-256 of its file), or (None, None) when no method wants one. Raises InputError when it does not fit the data."""
    if not config.needs_teacher:
        return None, None
    if config.teacher is None:
        raise InputError(
            f"--method {','.join(config.method)} needs a teacher: add --teacher FILE, or make one with --method teacher"
        )
    weights = checkpoint.load_weights(config.teacher)
    teacher = checkpoint.build_network(
        weights, config.teacher_depth, config.teacher_width, len(arrays.class_names)
    )
    if not weights.verified:
        say(f"{config.teacher} carries no checksum of fastvid: unverified, its SHA-256 is {weights.sha256}")
    ours = {
        "normalisation": {"mean": list(arrays.mean), "std": list(arrays.std)},
        "classes": list(arrays.class_names),
    }
    for name, value in ours.items():  # weights of other programs do not say
        found = weights.metadata.get(name, value)
        if found != value:
            raise InputError(
                f"{config.teacher} was trained with other {name} ({found}) than {config.dataset} has: "
                "take a teacher of this data set"
            )
    return teacher, weights.sha256


def summary(result: RunResult) -> str:
    """One line about a finished run."""
    text = (
        f"{result.method} | {result.percent:.3g} % of {result.dataset}, seed {result.seed}: {result.accuracy:.2f} % on "
        f"{result.evaluated_on} after the last epoch (best {result.best_accuracy:.2f}), {result.seconds:,.0f} s of training"
    )
    if result.preparation_seconds is not None:
        text += f" beside {result.preparation_seconds:,.0f} s of warm-up and {result.evaluation_seconds:,.0f} s of evaluation"
    if result.peak_memory:
        text += f", peak memory {result.peak_memory / 2**20:,.0f} MiB"
    variances = "; ".join(
        f"{tap} {low:.3g} to {high:.3g}" for tap, (low, _, high) in result.history[-1].variances.items()
    )
    return f"{text}; variances {variances}" if variances else text
