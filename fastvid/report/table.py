"""The table of a section as Markdown, and all sections as CSV: one row per cell, or one row per run.

The headline is the accuracy of the last epoch. Best epochs stand in a separate table, because they are
chosen on the evaluation split. An empty cell is –, never 0.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from fastvid.report.notes import notes
from fastvid.report.published import is_published, published
from fastvid.report.section import EMPTY, Column, Row, Section, listed, network_of, title
from fastvid.results import RunResult

COMPARED_WITH = ("student", "at")


def markdown(section: Section) -> str:
    lines = [f"# {section.title}: accuracy on the {section.evaluated_on} split, in percent", ""]
    if section.evaluated_on != "test":
        lines += [
            f"**These are {section.evaluated_on.upper()} numbers, NOT test numbers:** measured on the last "
            f"{section.setting('validation_per_class')} images per class of each subset, which were not "
            "trained on. Use them to choose settings; do not compare them with test accuracies.",
            "",
        ]
    spread = "mean ± sample standard deviation"
    best = f"chosen on the {section.evaluated_on} split, therefore not a result"
    tables = {
        f"Last epoch: {spread} over seeds (number of seeds)": _last_epochs(section),
        f"Best epoch, mean over seeds: {best}": _best_epochs(section),
        f"Paired difference on the same batches: {spread} (number of seeds)": _differences(section),
    }
    for sentence, rows in tables.items():
        if len(rows) > 1:
            lines += [sentence, "", *_aligned(rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(section))]) + "\n"


def _last_epochs(section: Section) -> list[list[str]]:
    header = ["Method"]
    for column in section.columns:
        header += [column.title, *(("paper", "seed repo") if is_published(section, column) else ())]
    rows = [header]
    if section.given_teacher is not None and section.columns[0].per_class is None:
        name = f"{title('teacher', ())} {network_of('teacher', section.runs)}"
        cells = [f"{section.given_teacher:.2f} (given)", *(EMPTY for _ in section.columns[1:])]
        rows.append([name, *_with_published(section, "teacher", cells)])
    for row in section.rows:
        cells = [_cell(section, row, column) for column in section.columns]
        rows.append([row.name, *_with_published(section, row.method, cells)])
    return rows


def _with_published(section: Section, method: str, cells: list[str]) -> Iterable[str]:
    for cell, column in zip(cells, section.columns):
        yield cell
        if is_published(section, column):
            for value in published(section, method, column):
                yield EMPTY if value is None else f"{value:.2f}"


def _cell(section: Section, row: Row, column: Column) -> str:
    """Mean ± sd (n), in bold if it is the best student of its column, and how many runs diverged."""
    sample = row.sample(column)
    means = [found for other in section.students if (found := other.sample(column).mean) is not None]
    best = row.method != "teacher" and len(means) > 1 and sample.mean == max(means)
    text = f"{sample:.2f}" if sample.values else ""
    return ", ".join(filter(None, (f"**{text}**" if best else text, row.divergence(column)))) or EMPTY


def _best_epochs(section: Section) -> list[list[str]]:
    rows = [["Method", *(column.title for column in section.columns)]]
    for row in section.rows:
        means = [row.sample(column, "best_accuracy").mean for column in section.columns]
        rows.append([row.name, *(EMPTY if value is None else f"{value:.2f}" for value in means)])
    return rows


def _differences(section: Section) -> list[list[str]]:
    """Each method minus the student and minus AT, where they are present."""
    methods = [method for method in COMPARED_WITH if any(row.method == method for row in section.rows)]
    pairs = [(method, column) for column in section.columns for method in methods]
    table = {row: [section.difference(row, *pair) for pair in pairs] for row in section.rows}
    used = [n for n in range(len(pairs)) if any(found[n].values for found in table.values())]
    minus = [f"{column.title}, minus {title(method, _runs_of(section, method))}" for method, column in pairs]
    rows = [["Method", *(minus[n] for n in used)]]
    for row, found in table.items():
        if row.method != "student" and any(sample.values for sample in found):
            rows.append([row.name, *(f"{found[n]:+.2f}" for n in used)])
    return rows


def _runs_of(section: Section, method: str) -> list[RunResult]:
    return [run for run in section.runs if run.method == method]


def _aligned(rows: list[list[str]]) -> list[str]:
    """A Markdown table that is readable as plain text too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        first, *others = (f"{text:{'>' if n else '<'}{widths[n]}}" for n, text in enumerate(row))
        lines.append(f"| {' | '.join([first, *others])} |")
    rule = "|".join("-" * (width + 1) + (":" if n else "-") for n, width in enumerate(widths))
    return [lines[0], f"|{rule}|", *lines[1:]]


def as_csv(sections: list[Section]) -> str:
    """One row per cell. seconds: summed over seeds; methods of one group share them."""
    rows = []
    for section in sections:
        for row in section.rows:
            rows += [_csv_row(section, row, column) for column in section.columns if row.cell(column)]
    return _csv(rows)


def _csv_row(section: Section, row: Row, column: Column) -> dict[str, object]:
    runs, sample = row.cell(column), row.sample(column)
    paper, seed_repository = published(section, row.method, column)
    cell = {
        "dataset": section.dataset,
        "evaluated_on": section.evaluated_on,
        "method": row.method,
        "settings": row.label,
        "per_class": column.per_class,
        "percent": f"{column.percent:.6g}",
        "n": len(sample.values),
        "mean": _decimals(sample.mean),
        "sd": _decimals(sample.sd),
        "best_mean": _decimals(row.sample(column, "best_accuracy").mean),
        "diverged": len(row.diverged(column)),
        "paper": paper,
        "seed_repository": seed_repository,
        "epochs": listed((run.config.get("epochs") for run in runs), between=" "),
        "seconds": f"{sum(run.seconds for run in runs):.1f}",
    }
    for method in COMPARED_WITH:
        difference = section.difference(row, method, column)
        cell |= {
            f"minus_{method}": _decimals(difference.mean),
            f"minus_{method}_sd": _decimals(difference.sd),
        }
    return cell


def runs_csv(sections: list[Section]) -> str:
    """One row per run: every plain field of the result, and where and how long it was trained."""
    left_out = ("group", "history", "config", "environment")
    fields = [name for name in RunResult.__dataclass_fields__ if name not in left_out]
    rows = []
    for row in (row for section in sections for row in section.rows):
        for run in sorted(row.runs, key=lambda run: (-run.percent, run.seed)):
            where = {name: run.environment.get(name) for name in ("device", "commit")}
            values = {name: getattr(run, name) for name in fields}
            rows.append(values | {"settings": row.label, "epochs": run.config.get("epochs")} | where)
    return _csv(rows)


def _csv(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _decimals(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
