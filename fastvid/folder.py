"""An output folder: results and final weights of finished runs, and the resume state of unfinished groups.

OUT/results.jsonl      one line per finished run
OUT/NAME.safetensors   final weights of that run; regressors and variances have keys under `method.`
OUT/GROUP.resume       everything that an interrupted group needs to resume; deleted at the end of the group
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path

import fastvid
from fastvid import checkpoint, results
from fastvid.config import CIRCUMSTANCES, OPTION_GROUPS, TrainConfig, method_parts
from fastvid.device import peak_memory
from fastvid.environment import environment
from fastvid.errors import InputError
from fastvid.files import locked
from fastvid.group import Group, Setup
from fastvid.loader import describe
from fastvid.progress import say
from fastvid.results import RunResult
from fastvid.student import Student


class OutputFolder:
    """The folder of --out. Several processes may use it at once: each claims the group that it trains."""

    def __init__(self, path: str | Path):
        self.path = results.open_folder(Path(path))

    @contextmanager
    def claim(self, settings: TrainConfig, *, wait: bool = False) -> Iterator[bool]:
        """Yield True if this process may train the group of these settings; no other process then can."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / f".{group_name(settings)}.lock", wait=wait))
            except BlockingIOError:
                yield False
            else:
                yield True

    def finished(self, setup: Setup) -> dict[str, RunResult]:
        """The results of the group of `setup` in this folder, by method, including diverged runs.

        Raises InputError if the folder holds results that cannot share one table with that group.
        """
        found, notes = results.read(self.path)
        for note in notes:
            say(note)
        return find_finished(setup, found)

    def check_weights(self, result: RunResult) -> None:
        """Print a line if the final weights of a finished run are missing or changed."""
        weights = self.path / result.weights
        if result.diverged or (weights.is_file() and checkpoint.sha256_of(weights) == result.weights_sha256):
            return
        remedy = "put the file back"
        if result.method != "teacher":
            remedy = f"to train it again, take its line out of {results.FILE}"
        say(f"{weights} {'has changed' if weights.is_file() else 'is gone'}: the result stands; {remedy}")

    def saved_students(self, settings: TrainConfig) -> list[str]:
        """Names of the students in the resume state of this group; [] if there is none."""
        path = self.resume_path(settings)
        return list(self._read(path)["students"]) if path.exists() else []

    def resume_path(self, settings: TrainConfig) -> Path:
        return self.path / f"{group_name(settings)}.resume"

    def save(self, group: Group) -> None:
        """Write the resume state of the group."""
        setup = group.setup
        state = group.state() | {
            "identities": {student.name: identity(student.settings) for student in group.students},
            "data_sha256": setup.data.sha256,
            "teacher_sha256": setup.teacher_sha256,
            "versions": _versions(setup),
        }
        checkpoint.save_state(self.resume_path(setup.settings), state)

    def load(self, group: Group) -> None:
        """Load the resume state of the group, if one exists. Raises InputError if that state does not fit."""
        setup, path = group.setup, self.resume_path(group.setup.settings)
        if not path.exists():
            return
        state, remedy = self._read(path), "give the old settings, another --out, or delete the file"
        versions, version_remedy = _versions(setup), "install that version again, or delete the file"
        try:
            for student in group.students:
                _require_same(state["identities"][student.name], identity(student.settings), path, remedy)
            wanted = {"data": setup.data.sha256, "teacher": setup.teacher_sha256}
            if not any(student.settings.needs_teacher for student in group.students):
                del wanted["teacher"]
            for what, value in wanted.items():
                if state[f"{what}_sha256"] != value:
                    raise InputError(f"{path} was made with another {what}: {remedy}")
            _require_same(state["versions"], versions, path, version_remedy)
            group.load_state(state)
        except InputError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is not a resume state of this version ({error}): delete it") from error

    @staticmethod
    def _read(path: Path) -> dict:
        state = checkpoint.load_state(path)
        if not isinstance(state, dict) or not isinstance(state.get("students"), dict):
            raise InputError(f"{path} is not a resume state of this version: delete it")
        return state

    def finish(self, group: Group) -> list[RunResult]:
        """Write final weights and results of all students of the group, then delete the resume state."""
        done = [self.finish_student(group, student) for student in group.students]
        self.resume_path(group.setup.settings).unlink(missing_ok=True)
        return done

    def finish_student(self, group: Group, student: Student) -> RunResult:
        """Write the final weights and the result of one student."""
        data, curve = group.setup.data, group.curves[student.name]
        tensors, prefix = dict(student.network.state_dict()), checkpoint.METHOD_PREFIX
        tensors |= {prefix + name: value for name, value in student.method.state_dict().items()}
        metadata = {
            "architecture": f"WRN-{student.network.depth}-{student.network.width}",
            "dataset": student.settings.dataset,
            "normalisation": {"mean": data.train.mean, "std": data.train.std},
            "classes": data.train.class_names,
            "accuracy": curve[-1].accuracy,
            "evaluated_on": data.evaluated_on,
            "config": identity(student.settings),
        }
        weights = self.path / weights_name(student.settings, student.name)
        sha256 = checkpoint.save_weights(weights, tensors, metadata)
        best = max(point.accuracy for point in curve)
        result = self._result(group, student, curve[-1].accuracy, best, weights.name, sha256)
        results.append(self.path, result)
        return result

    def record_divergence(self, group: Group, student: Student, reason: str) -> RunResult:
        """Write a result with the epoch and reason of the divergence, without accuracy and weights."""
        result = self._result(group, student, None, None, "", "", reason)
        results.append(self.path, result)
        return result

    def _result(
        self,
        group: Group,
        student: Student,
        accuracy: float | None,
        best: float | None,
        weights: str,
        weights_sha256: str,
        diverged: str | None = None,
    ) -> RunResult:
        setup, settings, data = group.setup, student.settings, group.setup.data
        seconds, device = group.clock.seconds, group.setup.device
        images = len(data.train) * group.step / setup.plan.steps_per_epoch
        (method,) = settings.method
        return RunResult(
            dataset=settings.dataset,
            method=method,
            percent=data.percent,
            per_class=settings.per_class,
            seed=settings.seed,
            accuracy=accuracy,
            best_accuracy=best,
            evaluated_on=data.evaluated_on,
            train_images=len(data.train),
            steps=group.step,
            seconds=seconds["training"],
            images_per_second=images / max(seconds["training"], 1e-9),
            group=group.methods,
            history=group.curves[student.name],
            weights=weights,
            weights_sha256=weights_sha256,
            data_sha256=data.sha256,
            teacher_sha256=setup.teacher_sha256 if settings.needs_teacher else None,
            teacher_accuracy=setup.teacher_accuracy if settings.needs_teacher else None,
            config=json.loads(json.dumps(dataclasses.asdict(settings))),
            environment=environment(device)
            | {name: group.origin(name) for name in group.origins[0]}
            | {"loader": describe(settings.loader)},
            preparation_seconds=seconds["preparation"],
            evaluation_seconds=seconds["evaluation"],
            checkpoint_seconds=seconds["checkpoint"],
            peak_memory=peak_memory(device),
            diverged=diverged,
            title=student.method.title,
            colour=student.method.colour,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def group_name(settings: TrainConfig) -> str:
    """Name of the group of these settings in file names, such as 500-seed0 or teacher-full-seed0."""
    prefix = "teacher-" if settings.method == ("teacher",) else ""
    return f"{prefix}{settings.per_class or 'full'}-seed{settings.seed}"


def weights_name(settings: TrainConfig, method: str) -> str:
    """File name of the final weights of `method`, such as vid-500-seed0.safetensors."""
    return f"{method}-{settings.per_class or 'full'}-seed{settings.seed}.safetensors"


def find_finished(setup: Setup, found: list[RunResult]) -> dict[str, RunResult]:
    """The results in `found` that belong to the group of `setup`, by method.

    Diverged runs with other settings are ignored. Raises InputError if any other result cannot share one
    table with the group.
    """
    settings, teacher = setup.settings, setup.teacher_sha256
    finished = {}
    teachers = {result.weights_sha256 for result in found if result.method == "teacher"}
    used = {result.teacher_sha256 for result in found} - {None}
    if teacher and (used - {teacher} or teachers and teacher not in teachers):
        raise InputError(
            f"{settings.out} holds results of another teacher (SHA-256 {min(used or teachers)[:12]}, "
            f"now {teacher[:12]}): give the old teacher or another --out"
        )
    if settings.method == ("teacher",) and used - teachers:
        raise InputError(
            f"{settings.out} holds students of a teacher (SHA-256 {min(used - teachers)[:12]}) whose result "
            "is not there, so no other teacher is trained there: give that teacher as --teacher, or another "
            "--out"
        )
    for result in found:
        run = {"method": (result.method,), "per_class": result.per_class, "seed": result.seed}
        try:
            _require_same_run(result, dataclasses.replace(setup.request, **run), setup)
        except InputError:
            if result.diverged:
                continue
            raise
        if (result.per_class, result.seed) == (settings.per_class, settings.seed):
            finished.setdefault(result.method, result)
    return finished


def _require_same_run(result: RunResult, settings: TrainConfig, setup: Setup) -> None:
    path = Path(settings.out) / results.FILE
    what = f"the {result.method} run in {path}"
    _require_same(result.config, identity(settings), what, "give the old settings or another --out")
    version = result.environment.get("fastvid")
    if version != fastvid.__version__:
        raise InputError(
            f"{settings.out} holds results of fastvid {version}, and this is {fastvid.__version__}: "
            "install that version again, or give another --out"
        )
    if result.data_sha256 != setup.data.sha256:
        raise InputError(
            f"{settings.out} holds results of another {settings.dataset} than the one that is now in "
            f"{settings.data}: give the old data or another --out"
        )


def identity(settings: TrainConfig) -> dict:
    """The settings that define a run of one method, as JSON values, without settings that the run ignores."""
    (method,) = settings.method
    idle = {*CIRCUMSTANCES, *OPTION_GROUPS} - {*method_parts(method)}
    idle |= {"student_depth", "student_width"} if method == "teacher" else set()
    idle |= {"teacher_depth", "teacher_width"} if method == "student" else set()
    values = json.loads(json.dumps(dataclasses.asdict(settings.resolved())))
    return {name: value for name, value in values.items() if name not in idle}


def _require_same(recorded: dict, wanted: dict, what: object, remedy: str) -> None:
    for name, value in wanted.items():
        found = recorded.get(name)
        if found != value:
            raise InputError(f"{what} was made with {name} = {found}, but now the value is {value}: {remedy}")


def _versions(setup: Setup) -> dict:
    """The versions that must be equal in all processes that train the same group."""
    return {name: value for name, value in environment(setup.device).items() if name in ("fastvid", "torch")}
