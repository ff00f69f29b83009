"""The runs of one table: a row for each method, a column for each training subset, in each cell the seeds.

When several folders are reported, a row is a method together with the settings in which the folders differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import mean, stdev

from fastvid.config import CIRCUMSTANCES, TrainConfig
from fastvid.results import RunResult

EMPTY = "–"
DATASETS = {"cifar10": ("CIFAR-10", 10), "cifar100": ("CIFAR-100", 100), "digits": ("digits", 10)}
"""title, and number of classes (all of equal size)"""
TITLES = {"teacher": "Teacher", "student": "Student", "fitnet": "FitNet"}  # for lines that record no title
_COORDINATES = {"dataset", "method", "per_class", "seed", *CIRCUMSTANCES}


@dataclass(frozen=True)
class Sample:
    """Numbers of different seeds. `f"{sample:.2f}"`: mean ± sample standard deviation (number of seeds)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return mean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        return stdev(self.values) if len(self.values) > 1 else None

    def __format__(self, spec: str) -> str:
        if not self.values:
            return EMPTY
        spread = "" if self.sd is None else f" ± {self.sd:{spec.lstrip('+')}}"
        return f"{self.mean:{spec}}{spread} ({len(self.values)})"


@dataclass(frozen=True)
class Column:
    """One training subset."""

    per_class: int | None
    """images of each class; None: the whole training split"""
    percent: float
    size: str

    @property
    def title(self) -> str:
        return f"{self.percent:.3g} % ({self.size})"


@dataclass(frozen=True, eq=False)
class Row:
    method: str
    settings: tuple[tuple[str, str], ...]
    """those in which the reported folders differ: (("vid weight", "3.0"), ...)"""
    runs: list[RunResult]

    @property
    def label(self) -> str:
        """The settings as text: "weight 3.0"."""
        names = [name.removeprefix(f"{self.method} ").replace("_", " ") for name, _ in self.settings]
        return ", ".join(f"{name} {value}" for name, (_, value) in zip(names, self.settings))

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (title(self.method, self.runs), self.label)))

    @property
    def name(self) -> str:
        """The title; teacher and student with their networks."""
        network = network_of(self.method, self.runs) if self.method in ("teacher", "student") else ""
        return " ".join([title(self.method, self.runs), network]).strip() + (self.label and f", {self.label}")

    def cell(self, column: Column) -> list[RunResult]:
        runs = [run for run in self.runs if run.per_class == column.per_class]
        return sorted(runs, key=lambda run: run.seed)

    def sample(self, column: Column, field: str = "accuracy") -> Sample:
        """The accuracies of the runs that did not diverge."""
        return Sample(tuple(getattr(run, field) for run in self.cell(column) if run.diverged is None))

    def diverged(self, column: Column) -> list[RunResult]:
        return [run for run in self.cell(column) if run.diverged is not None]

    def divergence(self, column: Column) -> str:
        """ "diverged (1 of 3)", or "" if no run diverged."""
        lost = len(self.diverged(column))
        return f"diverged ({lost} of {len(self.cell(column))})" if lost else ""


@dataclass(frozen=True)
class Section:
    """The runs of one data set and one evaluation split. They share a table."""

    dataset: str
    evaluated_on: str
    rows: list[Row]
    repeats: int
    """lines left out because an earlier line has the same row, subset and seed"""

    @cached_property
    def runs(self) -> list[RunResult]:
        return [run for row in self.rows for run in row.runs]

    @property
    def title(self) -> str:
        return DATASETS.get(self.dataset, (self.dataset,))[0]

    @cached_property
    def columns(self) -> list[Column]:
        """From the whole training split to the smallest subset."""
        found = {run.per_class: Column(run.per_class, run.percent, _size(run)) for run in self.runs}
        return sorted(found.values(), key=lambda column: (-column.percent, column.per_class is not None))

    @cached_property
    def students(self) -> list[Row]:
        """All rows but the teacher; the teacher if the teacher is alone."""
        return [row for row in self.rows if row.method != "teacher"] or self.rows

    @cached_property
    def given_teacher(self) -> float | None:
        """Accuracy on the test split of a teacher whose weights came from elsewhere."""
        if self.evaluated_on != "test" or any(row.method == "teacher" for row in self.rows):
            return None  # every subset has its own validation split, and the teacher may have seen its images
        return next((run.teacher_accuracy for run in self.runs if run.teacher_accuracy is not None), None)

    @cached_property
    def teacher(self) -> float | None:
        """Accuracy of the teacher, given or trained here."""
        trained = [run.accuracy for row in self.rows if row.method == "teacher" for run in row.runs]
        return self.given_teacher or Sample(tuple(filter(None, trained))).mean

    def difference(self, row: Row, method: str, column: Column) -> Sample:
        """Accuracy minus that of another method, seed by seed: runs of one seed see the same batches."""
        others = [other for other in self.rows if other.method == method]
        matching = [other for other in others if set(other.settings) <= set(row.settings)]
        if row.method in ("teacher", method) or not matching:
            return Sample(())
        accuracy = {run.seed: run.accuracy for run in matching[0].cell(column) if run.diverged is None}
        finished = [run for run in row.cell(column) if run.diverged is None and run.seed in accuracy]
        return Sample(tuple(run.accuracy - accuracy[run.seed] for run in finished))

    def setting(self, name: str) -> str:
        return listed(run.config.get(name) for run in self.runs)


def sections(*folders: list[RunResult]) -> list[Section]:
    """A section for each data set and evaluation split; each argument holds the results of one folder."""
    found = []
    for key in sorted({(run.dataset, run.evaluated_on) for runs in folders for run in runs}):
        parts = [[run for run in runs if (run.dataset, run.evaluated_on) == key] for runs in folders]
        found.append(_section(*key, parts))
    return found


def _section(dataset: str, evaluated_on: str, folders: list[list[RunResult]]) -> Section:
    names = _differing(folders)
    lines = []
    for found in folders:
        values: dict[str, dict[str, list[str]]] = {}  # {method: {setting: values in this folder}}
        for run in found if names else ():
            for name, value in settings_of(run).items():
                values.setdefault(run.method, {}).setdefault(name, []).append(value)
        for run in found:
            own = values.get(run.method, {})
            settings = tuple((name, listed(own[name])) for name in names if name in own)
            lines.append(((run.method, settings), run))
    rows: dict[tuple, dict[tuple, RunResult]] = {}
    for key, run in sorted(lines, key=lambda line: line[1].diverged is not None):  # finished runs count first
        rows.setdefault(key, {}).setdefault((run.per_class, run.seed), run)
    ordered = sorted((Row(*key, list(runs.values())) for key, runs in rows.items()), key=_order)
    return Section(dataset, evaluated_on, ordered, len(lines) - sum(map(len, rows.values())))


def _order(row: Row) -> tuple:
    """Teacher, student, then the methods in the order of their options in the configuration, then sums."""
    names = list(row.runs[0].config)
    places = [names.index(part) if part in names else len(names) for part in row.method.split("+")]
    numbers = [float(value) if value.replace(".", "").isdigit() else 0.0 for _, value in row.settings]
    first = row.method != "teacher", row.method != "student"
    return *first, len(places), places, row.method, numbers, row.settings


def settings_of(run: RunResult) -> dict[str, str]:
    """The settings that this run depends on, flat: {"epochs": "200", "vid weight": "3.0", ...}."""
    other_network = {"teacher": "student_", "student": "teacher_"}.get(run.method, "/")
    flat = {}
    for config in (asdict(TrainConfig()), run.config):  # a setting that an old line lacks has its default
        for name, value in config.items():
            if isinstance(value, dict):
                options = {f"{name} {option}": as_text(entry) for option, entry in value.items()}
                flat |= options if name in run.method.split("+") else {}
            elif name not in _COORDINATES and not name.startswith(other_network):
                flat[name] = as_text(value)
    flat["fastvid"] = str(run.environment.get("fastvid"))
    return flat | ({"teacher": run.teacher_sha256[:12]} if run.teacher_sha256 else {})


def _differing(folders: list[list[RunResult]]) -> list[str]:
    """Names of the settings in which the folders differ on the same subset; none if there is one folder."""
    values: dict[tuple, set[str]] = {}
    for run in [run for found in folders for run in found] if len(folders) > 1 else []:
        for name, value in settings_of(run).items():
            values.setdefault((name, run.per_class, run.method == "teacher"), set()).add(value)
    return sorted({name for (name, *_), found in values.items() if len(found) > 1})


def title(method: str, runs: Iterable[RunResult]) -> str:
    """Display name as recorded; for older lines derived from the method's name."""
    derived = "+".join(TITLES.get(part, part.upper()) for part in method.split("+"))
    return next((run.title for run in runs if run.title), derived)


def network_of(role: str, runs: Iterable[RunResult]) -> str:
    depth, width = (listed(run.config.get(f"{role}_{size}") for run in runs) for size in ("depth", "width"))
    return f"WRN-{depth}-{width}"


def _size(run: RunResult) -> str:
    """Images of the subset, with those held out for validation."""
    if run.per_class is not None:
        return f"{run.per_class} per class"
    _, classes = DATASETS.get(run.dataset, ("", 0))
    if not classes or run.train_images % classes:
        return "all images"
    return f"{run.train_images // classes + run.config.get('validation_per_class', 0)} per class"


def as_text(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def listed(values: Iterable[object], between: str = ", ") -> str:
    """Each distinct value once."""
    return between.join(dict.fromkeys(map(as_text, values)))
