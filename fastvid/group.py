"""A group: students trained together on the same batches, with one teacher, one subset and one seed."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from fastvid.config import TrainConfig
from fastvid.datasets import Data
from fastvid.device import autocast
from fastvid.environment import environment
from fastvid.loader import EvalLoader
from fastvid.plan import BatchPlan
from fastvid.progress import say
from fastvid.results import Evaluation
from fastvid.step import evaluate
from fastvid.stopwatch import PARTS, Stopwatch
from fastvid.student import Student
from fastvid.wresnet import Activations, WideResNet

EVAL_BATCH = 500


class Setup(NamedTuple):
    """Everything that all students of a group share and that no step changes."""

    request: TrainConfig
    """the settings of the whole group, as the user wrote them"""
    settings: TrainConfig
    """the same, resolved for this subset"""
    data: Data
    teacher: WideResNet | None
    teacher_sha256: str | None
    """SHA-256 of the teacher's weights file"""
    teacher_accuracy: float | None
    """accuracy in percent on the evaluation split"""
    device: torch.device
    engine: str

    @property
    def plan(self) -> BatchPlan:
        return BatchPlan(len(self.data.train), self.settings.batch_size, seed=self.settings.seed)


class Group:
    """The students of one training and their progress.

    students: the students that still train; a student that diverges is removed.
    methods: names of all students that started together.
    step: number of optimizer steps taken.  clock: seconds by part.
    curves: the learning curve of each student, by name.
    """

    def __init__(self, setup: Setup, students: list[Student]):
        self.setup, self.students = setup, students
        self.methods = [student.name for student in students]
        self.step, self.clock = 0, Stopwatch(setup.device)
        self.curves: dict[str, list[Evaluation]] = {name: [] for name in self.methods}
        here = environment(setup.device)
        origin = {name: here[name] for name in ("commit", "device", "threads")}
        self.origins = [origin | {"engine": setup.engine}]
        self._evaluation = EvalLoader(setup.data.evaluation, EVAL_BATCH, device=setup.device)

    @property
    def title(self) -> str:
        settings, data = self.setup.settings, self.setup.data
        names = ", ".join(student.name for student in self.students)
        return f"{names} | {data.percent:.3g} % of {settings.dataset}, seed {settings.seed}"

    def reset_losses(self) -> None:
        """Set the loss sums to zero. Call this at the start of each epoch."""
        for student in self.students:
            student.loss_sums.zero_()

    def evaluate(self, epoch: int, stop: object = False) -> str:
        """Add the point after `epoch` epochs to every curve that lacks this point.

        Skips the remaining students once `stop` is true. Returns the newest accuracies as text.
        """
        sample = None
        for student in self.students:
            curve = self.curves[student.name]
            if stop or (curve and curve[-1].epoch == epoch):
                continue
            if sample is None and student.method.transfers:
                sample = self._sample()
            curve.append(self._measure(student, epoch, sample))
        latest = ((student.name, self.curves[student.name]) for student in self.students)
        return "  ".join(f"{name} {curve[-1].accuracy:.1f}" for name, curve in latest if curve)

    def _measure(
        self, student: Student, epoch: int, sample: tuple[torch.Tensor, Activations] | None
    ) -> Evaluation:
        settings = self.setup.settings
        accuracy = evaluate(student.network, self._evaluation, self.setup.device, settings.precision)
        losses = student.losses(len(self.setup.data.train))
        variances = {
            tap: _rounded(values.min(), values.median(), values.max())
            for tap, values in student.method.variances().items()
        }
        information = student.information(*sample) if sample else {}
        information = {  # NaN means that the teacher map is constant
            tap: _rounded(*values) for tap, values in information.items() if all(map(math.isfinite, values))
        }
        return Evaluation(epoch, accuracy, *losses, variances, information)

    @torch.no_grad()
    def _sample(self) -> tuple[torch.Tensor, Activations]:
        """The first evaluation images and the teacher's activations: the input of Student.information."""
        images, _ = next(iter(self._evaluation))
        with autocast(self.setup.device, self.setup.settings.precision):
            return images, self.setup.teacher.to(self.setup.device)(images)

    def remove_diverged(self) -> list[tuple[Student, str]]:
        """Remove students whose losses or gradients were NaN or inf.

        Returns each with the reason: (student, "epoch 12: transfer loss inf").
        """
        found = []
        for student in list(self.students):
            if reason := student.divergence():
                good = self.step - max(student.failed_steps(), 1)
                reason = f"epoch {good // self.setup.plan.steps_per_epoch + 1}: {reason}"
                others = "; the other students continue" if len(self.students) > 1 else ""
                say(f"{student.name} diverged in {reason}{others}")
                self.students.remove(student)
                found.append((student, reason))
        return found

    def origin(self, name: str) -> object:
        """The commit, device, threads or engine of this group; "A, then B" if it changed during training."""
        values = list(dict.fromkeys(origin[name] for origin in self.origins))
        return values[0] if len(values) == 1 else ", then ".join(map(str, values))

    def state(self) -> dict:
        """Everything that another process needs to resume with the same bits."""
        curves = {name: list(map(dataclasses.asdict, curve)) for name, curve in self.curves.items()}
        return {
            "methods": self.methods,
            "step": self.step,
            "seconds": self.clock.seconds,
            "origins": self.origins,
            "curves": curves,
            "students": {student.name: student.state() for student in self.students},
        }

    def load_state(self, state: dict) -> None:
        """Resume from `state`. Raises KeyError, TypeError or ValueError if `state` does not fit."""
        for student in self.students:
            student.load_state(state["students"][student.name])
            self.curves[student.name] = [Evaluation(**point) for point in state["curves"][student.name]]
        self.methods, self.step = list(state["methods"]), int(state["step"])
        self.clock.seconds = {part: float(state["seconds"][part]) for part in PARTS}
        here, before = self.origins[0], state["origins"][-1]
        self.origins = list(state["origins"])
        changed = [
            f"{name} was {before[name]} and is {here[name]}" for name in here if before[name] != here[name]
        ]
        if changed:
            self.origins.append(here)
            say(
                f"{self.title}: resumes in another environment, so the bits may differ; the results record "
                f"both: {', '.join(changed)}"
            )


def _rounded(*values: float) -> list[float]:
    return [float(f"{float(value):.4g}") for value in values]
