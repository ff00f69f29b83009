"""The table of an output folder: runs in sections, rows and columns, as Markdown with its notes and as CSV. No torch, no NumPy.

The headline is the accuracy of the last epoch: mean ± sample standard deviation over seeds, and their number in parentheses.
Best epochs stand in a table of their own, since they are chosen on the evaluation split. An empty cell is –, never 0.
Runs of one seed see the same batches, so methods are compared seed by seed: mean difference and its 95 % interval (Student's t).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import mean, stdev

from fastvid import results
from fastvid.config import OPTION_GROUPS, PROTOCOLS, Protocol, TrainConfig
from fastvid.results import RunResult

EMPTY = "–"
CLASSES = {
    "cifar10": 10,
    "cifar100": 100,
    "digits": 10,
}  # balanced sets, where "per class" of the whole set is one number
NAMES = {"teacher": "Teacher", "student": "Student", "kd": "KD", "fitnet": "FitNet", "at": "AT", "vid": "VID"}
ORDER = (*NAMES, "kd+at", "kd+vid")
RECIPE = ("learning_rate", "lr_decay", "milestones", "momentum", "weight_decay", "clip_norm")
CSV_COLUMNS = (
    "dataset",
    "evaluated_on",
    "method",
    "per_class",
    "percent",
    "n",
    "mean",
    "sd",
    "best_mean",
    "paper",
    "seed_repository",
    "epochs",
    "seconds",
    "minus_student",
    "minus_student_95",
    "minus_at",
    "minus_at_95",
)
COMPARED_WITH = ("student", "at")
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 1 to 9 degrees of freedom

# CIFAR-10, WRN-40-2 and WRN-16-1, top-1 in percent: {method: {percent of the training images: (paper, seed repository)}}.
# Paper: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019. Seed repository: the newest README of
# the public reimplementation that this project started from, mean of 3 runs after the last epoch; it never reported VID or a spread.
PUBLISHED: dict[str, dict[int, tuple[float | None, float | None]]] = {
    "teacher": {100: (94.26, 94.98)},
    "student": {100: (90.72, 91.22), 20: (84.67, 84.85), 10: (79.63, 80.29), 2: (58.84, 58.11)},
    "kd": {100: (91.27, 90.60), 20: (86.11, 84.13), 10: (82.23, 78.57), 2: (64.24, 59.63)},
    "fitnet": {100: (90.64, 91.61), 20: (84.78, 86.24), 10: (80.73, 82.74), 2: (68.90, 56.69)},
    "at": {100: (91.60, 91.85), 20: (87.26, 87.60), 10: (84.94, 84.70), 2: (73.40, 74.57)},
    "vid": {100: (91.85, None), 20: (89.73, None), 10: (88.09, None), 2: (81.59, None)},
}
PUBLISHED_NETWORKS = {"teacher_depth": 40, "teacher_width": 2, "student_depth": 16, "student_width": 1}
PUBLISHED_FRACTIONS = (100, 20, 10, 2)


@dataclass(frozen=True)
class Section:
    """The runs that may stand in one table: one data set, one evaluation split."""

    dataset: str
    evaluated_on: str
    runs: list[RunResult]
    repeats: int
    """lines left out because an earlier one has the same method, subset and seed"""

    @cached_property
    def columns(self) -> list[RunResult]:
        """One run of each subset, from the whole set to the smallest."""
        by_subset = {run.per_class: run for run in reversed(self.runs)}
        return sorted(by_subset.values(), key=lambda run: (-run.percent, run.per_class is not None))

    @cached_property
    def methods(self) -> list[str]:
        """Those of the runs in the order of the paper's table, the teacher first even when it was given."""
        present = {run.method for run in self.runs}
        if self.given_teacher is not None and self.columns[0].per_class is None:
            present.add("teacher")
        return [*(name for name in ORDER if name in present), *sorted(present - set(ORDER))]

    @cached_property
    def given_teacher(self) -> float | None:
        """Accuracy of the teacher on the test split when its weights came from outside."""
        if self.evaluated_on != "test" or any(run.method == "teacher" for run in self.runs):
            return None  # each subset has a validation split of its own, and the teacher may have been trained on it
        return next((run.teacher_accuracy for run in self.runs if run.teacher_accuracy is not None), None)

    def cell(self, method: str, column: RunResult) -> list[RunResult]:
        return sorted(
            (run for run in self.runs if (run.method, run.per_class) == (method, column.per_class)),
            key=lambda run: run.seed,
        )

    def difference(self, method: str, other: str, column: RunResult) -> Difference | None:
        """None where no seed has both, and for the teacher, which does not see their batches."""
        others = {run.seed: run.accuracy for run in self.cell(other, column)}
        found = [run.accuracy - others[run.seed] for run in self.cell(method, column) if run.seed in others]
        if method in (other, "teacher") or not found:
            return None
        freedom = len(found) - 1
        half_width = _t_95(freedom) * stdev(found) / math.sqrt(len(found)) if freedom else None
        return Difference(mean(found), half_width, len(found))

    def name(self, method: str) -> str:
        network = (
            f" WRN-{self.setting(f'{method}_depth')}-{self.setting(f'{method}_width')}"
            if method in ("teacher", "student")
            else ""
        )
        return short_name(method) + network

    def setting(self, name: str) -> str:
        return _listed(run.config.get(name) for run in self.runs)

    def followers(self, column: RunResult) -> list[RunResult]:
        """The runs that give a column its length: the students, or the teacher where it is alone."""
        runs = [run for run in self.runs if run.per_class == column.per_class]
        return [run for run in runs if run.method != "teacher"] or runs

    def epochs(self, column: RunResult) -> str:
        return _listed(run.config.get("epochs") for run in self.followers(column))

    def published_fraction(self, column: RunResult) -> int | None:
        """Which of the published columns this is, if any. Published numbers are of the test split and of two networks."""
        same_networks = all(
            run.config.get(name) == value for run in self.runs for name, value in PUBLISHED_NETWORKS.items()
        )
        if (self.dataset, self.evaluated_on) != ("cifar10", "test") or not same_networks:
            return None
        return next(
            (
                fraction
                for fraction in PUBLISHED_FRACTIONS
                if math.isclose(column.percent, fraction, rel_tol=0.005)
            ),
            None,
        )

    def published(self, method: str, column: RunResult) -> tuple[float | None, float | None]:
        """(paper, seed repository)."""
        return PUBLISHED.get(method, {}).get(self.published_fraction(column) or 0, (None, None))


@dataclass(frozen=True)
class Difference:
    """Accuracy minus that of another method, over the seeds that both have."""

    mean: float
    half_width: float | None
    """of its 95 % interval; None for one seed, which says nothing of it"""
    seeds: int

    def __str__(self) -> str:
        interval = "" if self.half_width is None else f" ± {self.half_width:.2f}"
        return f"{self.mean:+.2f}{interval} ({self.seeds})"


def _t_95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t; beyond the list by its expansion in 1/freedom (Cornish and Fisher), to 0.001."""
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    return 1.95996 + 2.37227 / freedom + 2.82250 / freedom**2 + 2.55585 / freedom**3


def short_name(method: str) -> str:
    return "+".join(NAMES.get(part, part) for part in method.split("+"))


def sections(found: list[RunResult]) -> list[Section]:
    """Test and validation accuracies, and those of several data sets, never share a table."""
    grouped: dict[tuple[str, str], dict[tuple, RunResult]] = {}
    for run in found:
        grouped.setdefault((run.dataset, run.evaluated_on), {}).setdefault(run.key(), run)
    lines = [(run.dataset, run.evaluated_on) for run in found]
    return [
        Section(*title, list(runs.values()), lines.count(title) - len(runs))
        for title, runs in sorted(grouped.items())
    ]


def markdown(section: Section) -> str:
    lines = [f"# {section.dataset}: accuracy on the {section.evaluated_on} split, in percent", ""]
    if section.evaluated_on != "test":
        warning = (
            f"**These are {section.evaluated_on.upper()} numbers, NOT test numbers:** measured on the last "
            f"{section.setting('validation_per_class')} images per class of each subset, which were kept out of training. "
            "They serve to choose settings; compare them with no test accuracy and with no published one."
        )
        lines += [warning, ""]
    lines += [
        "Last epoch: mean ± sample standard deviation over seeds (number of seeds)",
        "",
        *_aligned(_last_epoch_rows(section)),
        "",
    ]
    lines += [
        f"Best epoch, mean over seeds: chosen on the {section.evaluated_on} split, therefore no result",
        "",
        *_aligned(_best_rows(section)),
        "",
    ]
    if len(paired := _paired_rows(section)) > 1:
        lines += [
            "Difference, seed by seed on the same batches: mean ± half of its 95 % interval (number of seeds)",
            "",
            *_aligned(paired),
            "",
        ]
    return "\n".join([*lines, *(f"- {note}" for note in _notes(section))]) + "\n"


def _last_epoch_rows(section: Section) -> list[list[str]]:
    header = ["Method"]
    for column in section.columns:
        header += [
            column_title(column),
            *(("paper", "seed repo") if section.published_fraction(column) else ()),
        ]
    rows = [header]
    for method in section.methods:
        row = [section.name(method)]
        for column in section.columns:
            row.append(_last_epoch(section, method, column))
            if section.published_fraction(column):
                row += [
                    EMPTY if value is None else f"{value:.2f}" for value in section.published(method, column)
                ]
        rows.append(row)
    return rows


def _last_epoch(section: Section, method: str, column: RunResult) -> str:
    if method == "teacher" and section.given_teacher is not None:
        return f"{section.given_teacher:.2f} (given)" if column.per_class is None else EMPTY
    accuracies = [run.accuracy for run in section.cell(method, column)]
    spread = f" ± {stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{mean(accuracies):.2f}{spread} ({len(accuracies)})" if accuracies else EMPTY


def _best_rows(section: Section) -> list[list[str]]:
    rows = [["Method", *(column_title(column) for column in section.columns)]]
    for method in section.methods:
        cells = [[run.best_accuracy for run in section.cell(method, column)] for column in section.columns]
        if any(cells):
            rows.append([section.name(method), *(f"{mean(cell):.2f}" if cell else EMPTY for cell in cells)])
    return rows


def _paired_rows(section: Section) -> list[list[str]]:
    """Each method, minus the student and minus AT, where they are there."""
    pairs = [
        (other, column)
        for column in section.columns
        for other in COMPARED_WITH
        if section.cell(other, column)
    ]
    rows = [["Method", *(f"{column_title(column)}, minus {short_name(other)}" for other, column in pairs)]]
    for method in section.methods:
        cells = [section.difference(method, other, column) for other, column in pairs]
        if method != "student" and any(cells):
            rows.append([section.name(method), *(str(cell or EMPTY) for cell in cells)])
    return rows


def _aligned(rows: list[list[str]]) -> list[str]:
    """A Markdown table whose source is as readable as its rendering: it is also printed."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        " | ".join(
            text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    rule = "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths))
    return [f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]


def column_title(column: RunResult) -> str:
    return f"{column.percent:.3g} % ({subset_size(column)})"


def subset_size(column: RunResult) -> str:
    """Images of the subset, with those that were held out of it for validation."""
    if column.per_class is not None:
        return f"{column.per_class} per class"
    classes = CLASSES.get(column.dataset)
    if classes is None or column.train_images % classes:
        return "all images"
    return f"{column.train_images // classes + column.config.get('validation_per_class', 0)} per class"


def _notes(section: Section) -> list[str]:
    """What a reader must know before believing the table."""
    seeds = sorted({run.seed for run in section.runs})
    data = (
        f"Data set {section.dataset}, {section.evaluated_on} split, {len(seeds)} seed{'s' * (len(seeds) > 1)} ({_listed(seeds)}). "
        f"The last epoch is the headline. {EMPTY}: not run here, or never published."
    )
    protocol = (
        f"Protocol `{section.setting('protocol')}`: {_lengths(section, section.columns)}; batch {section.setting('batch_size')}; "
        f"{section.setting('precision')}.{_teacher_length(section)}{_departures(section)}"
    )
    notes = [data, protocol]
    if section.given_teacher is not None:
        notes.append(
            f"{section.name('teacher')} was given, not trained here: "
            f"{section.given_teacher:.2f} on the {section.evaluated_on} split."
        )
    notes += _weights(section)
    if any(section.published_fraction(column) for column in section.columns):
        notes.append(_comparison(section))
    where = _listed(
        f"{run.environment.get('device')}, torch {run.environment.get('torch')}" for run in section.runs
    )
    notes.append(
        f"Trained on {where}: {_training_seconds(section):,.0f} s in all, without start-up and evaluation."
    )
    commits = dict.fromkeys(str(run.environment.get("commit")) for run in section.runs)
    if len(commits) > 1:
        notes.append(f"Trained by several commits of fastvid: {_listed(commits)}.")
    if section.repeats:
        notes.append(
            f"{section.repeats} line(s) of {results.FILE} repeat a method, subset and seed: only the first of each counts."
        )
    return notes


def _lengths(section: Section, columns: list[RunResult]) -> str:
    return ", ".join(f"{section.epochs(column)} epochs on {column.percent:.3g} %" for column in columns)


def _teacher_length(section: Section) -> str:
    """Said only where it differs from that of the students beside it."""
    epochs = {run.config.get("epochs") for run in section.runs if run.method == "teacher"}
    beside = {run.config.get("epochs") for column in section.columns[:1] for run in section.followers(column)}
    return f" The teacher: {_listed(sorted(epochs))} epochs." if epochs - beside else ""


def _departures(section: Section) -> str:
    """What was trained otherwise than the named protocol and the default recipe say."""
    changed, defaults = [], asdict(TrainConfig())
    if protocol := PROTOCOLS.get(section.setting("protocol")):
        for column in section.columns:
            wanted = _epochs_of(protocol, section.followers(column)[0])
            if section.epochs(column) != wanted:
                changed.append(f"{_lengths(section, [column])} (protocol: {wanted})")
        if section.setting("batch_size") != str(protocol.batch_size):
            changed.append(f"batch {section.setting('batch_size')} (protocol: {protocol.batch_size})")
    changed += [
        f"{name} {section.setting(name)}"
        for name in RECIPE
        if section.setting(name) != _listed([defaults[name]])
    ]
    return f" **Not as the protocol and the defaults say: {', '.join(changed)}.**" if changed else ""


def _epochs_of(protocol: Protocol, run: RunResult) -> str:
    if run.method == "teacher":
        return str(protocol.teacher_epochs)
    return str(protocol.full_epochs if run.per_class is None else protocol.reduced_epochs)


def _weights(section: Section) -> list[str]:
    """The options of every transfer term in the table."""
    terms = []
    for part in OPTION_GROUPS:
        options = [run.config.get(part, {}) for run in section.runs if part in run.method.split("+")]
        if options:
            terms.append(f"{NAMES[part]}: {_listed(map(_options, options), between=' or ')}")
    return [f"{'; '.join(terms)}."] if terms else []


def _options(options: dict) -> str:
    shown = {
        name: value
        for name, value in options.items()
        if name != "hint_share" or options.get("schedule") != "joint"
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _comparison(section: Section) -> str:
    """Where the published columns come from, and whether they can be compared with ours."""
    seed = PROTOCOLS["seed"]
    text = (
        f"paper: Ahn et al., CVPR 2019, number of epochs unknown. seed repo: its newest README, mean of 3 runs, protocol `seed`: "
        f"{seed.full_epochs} epochs on 100 %, {seed.reduced_epochs} on less, batch {seed.batch_size}. "
    )
    shared = [column for column in section.columns if section.published_fraction(column)]
    other = [
        column
        for column in shared
        if section.epochs(column) != _epochs_of(seed, section.followers(column)[0])
    ]
    batch = section.setting("batch_size")
    if other or batch != str(seed.batch_size):
        return f"{text}**Ours is not comparable with either: {_lengths(section, other or shared)}, batch {batch}.**"
    return f"{text}Ours has the epochs and the batch of the seed repository; the paper's may differ."


def _training_seconds(section: Section) -> float:
    """Runs of a group are trained together and each carries the whole group's seconds, so a group counts once."""
    groups: dict[tuple, float] = {}
    for run in section.runs:
        group = run.per_class, run.seed, tuple(run.group)
        groups[group] = max(run.seconds, groups.get(group, 0.0))
    return sum(groups.values())


def _listed(values: Iterable[object], between: str = ", ") -> str:
    """Each different value once; more than one is a sign of results put together by hand."""
    texts = (
        "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value) for value in values
    )
    return between.join(dict.fromkeys(texts))


def as_csv(sections: list[Section]) -> str:
    """One row per cell that has runs. seconds: summed over seeds, each shared by the methods that were trained together."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for section in sections:
        for method in section.methods:
            for column in section.columns:
                if runs := section.cell(method, column):
                    accuracies = [run.accuracy for run in runs]
                    spread = f"{stdev(accuracies):.4f}" if len(runs) > 1 else None
                    writer.writerow(
                        (
                            section.dataset,
                            section.evaluated_on,
                            method,
                            column.per_class,
                            f"{column.percent:.6g}",
                            len(runs),
                            f"{mean(accuracies):.4f}",
                            spread,
                            f"{mean(run.best_accuracy for run in runs):.4f}",
                            *section.published(method, column),
                            _listed((run.config.get("epochs") for run in runs), between=" "),
                            f"{sum(run.seconds for run in runs):.1f}",
                            *_paired_values(section, method, column),
                        )
                    )
    return text.getvalue()


def _paired_values(section: Section, method: str, column: RunResult) -> Iterator[str | None]:
    for other in COMPARED_WITH:
        difference = section.difference(method, other, column)
        yield None if difference is None else f"{difference.mean:.4f}"
        yield None if difference is None or difference.half_width is None else f"{difference.half_width:.4f}"
