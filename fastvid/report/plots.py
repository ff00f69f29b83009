"""The plots of a section as PNG, SVG and PDF. Only this module of the report needs matplotlib (optional).

curves: accuracy over epochs. accuracy: last epochs as a dot plot. labels: last epochs against labels per
class. information: what the regressors explain of the teacher maps.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable
from statistics import mean

try:
    import matplotlib
except ValueError:  # MPLBACKEND names a backend that is not installed; the plots do not need it
    _backend = os.environ.pop("MPLBACKEND", "")
    for _name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        del sys.modules[_name]  # half imported
    import matplotlib

    os.environ["MPLBACKEND"] = _backend
import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastvid.report.published import published
from fastvid.report.section import Column, Row, Section
from fastvid.results import RunResult

COLOURS = {"teacher": "#000000", "student": "#8C8C8C"}
# Okabe and Ito's colours, which colour-blind people can tell apart, without their faint yellow; then Tol's
CYCLE = ("#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#0072B2", "#882255", "#999933", "#332288")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "fastvid",  # equal results give equal bytes
    "pdf.fonttype": 42,
}
METADATA = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
EARLY = 0.2  # this first share of the training does not widen the axis, so that the ends can be told apart
TEACHER = {"color": COLOURS["teacher"], "linestyle": (0, (6, 3)), "linewidth": 1}


def plots_of(section: Section) -> dict[str, Callable]:
    """{file name: its drawing function}."""
    found = {"curves": _curves, "accuracy": _accuracy}
    found |= {"labels": _labels} if len(section.columns) > 1 else {}
    return found | ({"information": _information} if _taps(section) else {})


def render(draw: Callable, section: Section) -> dict[str, bytes]:
    """{"png": ..., "svg": ..., "pdf": ...} of `draw(figure, section)`: Agg, the default style, no display."""
    files = {}
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        draw(figure, section)
        for kind, metadata in METADATA.items():
            content = io.BytesIO()
            figure.savefig(content, format=kind, metadata=metadata)
            files[kind] = content.getvalue()
    return files


def _curves(figure, section: Section) -> None:
    columns = section.columns[::-1]
    across = 2 if len(columns) == 4 else min(len(columns), 3)
    down = math.ceil(len(columns) / across)
    figure.set_size_inches(0.5 + 5.0 * across, 0.7 + 3.3 * down)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    for place, (column, panel) in enumerate(zip(columns, panels)):
        _draw_curves(panel, section, column)
        panel.set_title(column.title)
        if place % across == 0:
            panel.set_ylabel(f"accuracy on the {section.evaluated_on} split, %")
        if place + across >= len(columns):
            panel.set_xlabel("epochs (dotted: the learning rate drops)")
    figure.suptitle(f"{section.title}: learning curves, {_seeds(section, 'mean and range')}")


def _draw_curves(panel, section: Section, column: Column) -> None:
    rows = [row for row in section.students if row.cell(column)]
    runs = [run for row in rows for run in row.cell(column)]
    length = max((run.config.get("epochs") or 1 for run in runs), default=1)
    colours, drawn = _colours(section), {}
    for row in rows:
        points = _by_epoch(row.cell(column), lambda point: {"": point.accuracy}).get("", {})
        for run in row.diverged(column):  # as far as it came, with a cross at the end
            x, y = zip(*((p.epoch, p.accuracy) for p in run.history)) if run.history else ((0,), (0,))
            panel.plot(x, y, "-x", color=colours[row], lw=0.6, markevery=[-1], zorder=1)
        if points:
            drawn[row] = {epoch: mean(values) for epoch, values in points.items()}
            _draw_line(panel, row, points, colours[row])
    late = [value for means in drawn.values() for epoch, value in means.items() if epoch > EARLY * length]
    for milestone in runs[0].config.get("milestones", ()) if runs else ():
        panel.axvline(milestone * length, color="0.6", linestyle=":", linewidth=0.8, zorder=0)
    panel.set_xlim(0, length)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.set_ylim(_cropped([*late, *_teacher(section)]))
    for row, means in drawn.items():
        _mark_falls(panel, means, colours[row])
    ends = [(list(means.values())[-1], row.title, colours[row]) for row, means in drawn.items()]
    _label_ends(panel, section, ends, gap=0.062)


def _by_epoch(runs: list[RunResult], values_of: Callable) -> dict[str, dict[int, list[float]]]:
    """{name: {epoch: values of the runs that did not diverge}}, epochs in order."""
    found: dict[str, dict[int, list[float]]] = {}
    points = [point for run in runs if run.diverged is None for point in run.history]
    for point in sorted(points, key=lambda point: point.epoch):
        for name, value in values_of(point).items():
            found.setdefault(name, {}).setdefault(point.epoch, []).append(value)
    return found


def _draw_line(panel, row: Row, points: dict[int, list[float]], colour: str) -> None:
    """Mean over seeds, and the range between them."""
    low, high = list(map(min, points.values())), list(map(max, points.values()))
    panel.fill_between(list(points), low, high, color=colour, alpha=0.18, linewidth=0)
    style = {"linestyle": _dashes(row), "marker": "o" if len(points) < 10 else None}
    panel.plot(list(points), list(map(mean, points.values())), color=colour, lw=1.4, ms=3, **style)
    panel.grid(axis="y", color="0.92")


def _mark_falls(panel, means: dict[int, float], colour: str) -> None:
    """Mark where a curve that was on the panel falls far below it. The initial rise stays unmarked."""
    (low, high), seen = panel.get_ylim(), False
    for epoch, value in means.items():
        if seen and value < low - 0.1 * (high - low):
            panel.plot([epoch], [low], "v", color=colour, ms=5, clip_on=False)
            panel.annotate(
                f"{value:.0f}", (epoch, low), (9, 2), textcoords="offset points", color=colour, size=8
            )
        seen |= value >= low


def _accuracy(figure, section: Section) -> None:
    """One panel per subset, one line per method: mean and standard deviation, with the numbers beside."""
    rows, columns, colours = section.students, section.columns, _colours(section)
    figure.set_size_inches(max(5.5, 1.4 + 2.9 * len(columns)), 1.6 + 0.3 * len(rows))
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for column, panel in zip(columns, panels):
        values = _teacher(section)
        for accuracy in values:
            panel.axvline(accuracy, **TEACHER)
        for place, row in enumerate(rows):
            sample, paper = row.sample(column), published(section, row.method, column)[0]
            if sample.values:
                panel.errorbar(sample.mean, place, xerr=sample.sd, fmt="o", c=colours[row], ms=5, capsize=3)
                values += [sample.mean - (sample.sd or 0), sample.mean + (sample.sd or 0)]
            if paper and row.cell(column):
                panel.plot(paper, place, "D", color=colours[row], ms=5, fillstyle="none")
                values.append(paper)
            number = (
                f"{sample:.1f}".rpartition(" ")[0] if sample.values else ""
            )  # without the number of seeds
            text = "\n".join(filter(None, (number, row.divergence(column))))
            panel.annotate(text, (1.03, place), xycoords=panel.get_yaxis_transform(), va="center", size=8)
        panel.set_xlim(_cropped(values))
        panel.set_title(column.title)
        panel.set_xlabel("accuracy, %")
        panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        panel.grid(color="0.92")
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(rows)), [row.title for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(_last_epoch(section))
    _legend(figure, section)


def _labels(figure, section: Section) -> None:
    """Accuracy against images per class; the paper's numbers are hollow marks to the left of ours."""
    columns, rows, colours = section.columns[::-1], section.students, _colours(section)
    figure.set_size_inches(7.5, 4.8)
    panel, ends, values = figure.subplots(), [], _teacher(section)
    places = [math.log(column.percent) for column in columns]
    dodge = 0.006 * (places[-1] - places[0])  # error bars must not hide each other
    for number, row in enumerate(rows):
        shift = (number - len(rows) / 2) * dodge
        found = [(x + shift, row.sample(column)) for x, column in zip(places, columns)]
        if found := [(x, sample.mean, sample.sd or 0) for x, sample in found if sample.values]:
            x, means, errors = zip(*found)
            style = {"fmt": f"o{_dashes(row)}", "color": colours[row], "ms": 4, "lw": 1.3}
            panel.errorbar(x, means, errors, capsize=3, **style)
            values += [m + sign * error for m, error in zip(means, errors) for sign in (1, -1)]
            ends.append((means[-1], row.title, colours[row]))
        for x, column in zip(places, columns):
            if paper := published(section, row.method, column)[0]:
                shift = (len(rows) / 2 + 2) * dodge
                panel.plot(x - shift, paper, "D", color=colours[row], ms=5, fillstyle="none")
                values.append(paper)
    panel.set_ylim(_cropped(values))
    panel.set_xlim(right=places[-1] + len(rows) * dodge)
    sizes = [f"{column.size.removesuffix(' per class')}\n{column.percent:.3g} %" for column in columns]
    panel.set_xticks(places, sizes)
    panel.grid(axis="y", color="0.92")
    panel.set_xlabel("labelled training images per class (logarithmic)")
    panel.set_ylabel("accuracy, %")
    panel.set_title(_last_epoch(section))
    _label_ends(panel, section, ends, gap=0.042)
    _legend(figure, section)


def _information(figure, section: Section) -> None:
    """For each subset two lines of panels, one panel per tap: explained variance, and nats per element."""
    lines: dict[tuple, dict[int, list[float]]] = {}
    for row in section.rows:
        for column in section.columns[::-1]:
            for quantity in (0, 1):
                found = _by_epoch(
                    row.cell(column), lambda p: {name: pair[quantity] for name, pair in p.information.items()}
                )
                for name, points in found.items():
                    lines[column, quantity, name.rpartition(" at ")[2], row, name] = points
    shown = [(column, quantity) for column in section.columns[::-1] for quantity in (0, 1)]
    shown = [key for key in shown if any(line[:2] == key for line in lines)]
    taps = _taps(section)
    figure.set_size_inches(1.2 + 2.6 * len(taps), 1.0 + 1.7 * len(shown))
    grid = figure.subplots(len(shown), len(taps), squeeze=False, sharey="row")
    colours = _colours(section)
    for key, panels in zip(shown, grid):
        late = [0.0]
        for (*where, tap, row, _), points in lines.items():
            if tuple(where) == key:
                _draw_line(panels[taps.index(tap)], row, points, colours[row])
                late += [value for e, found in points.items() if e > EARLY * max(points) for value in found]
        panels[0].set_ylabel(("explained variance", "nats per element")[key[1]])
        panels[0].set_ylim(_cropped(late))
        for tap, panel in zip(taps, panels):
            panel.set_title(f"{tap}, {key[0].percent:.3g} %" if key[1] == 0 else "")
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            panel.axhline(0, color="0.5", linewidth=0.8)
            panel.set_xlim(left=0)
    for panel in grid[-1]:
        panel.set_xlabel("epochs")
    figure.suptitle(f"{section.title}: what the regressors explain, {_seeds(section, 'mean and range')}")
    drawn = {row.title: Line2D([], [], color=colours[row], ls=_dashes(row)) for _, _, _, row, _ in lines}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4)


def _taps(section: Section) -> list[str]:
    """The taps with a regressor, in the order of the regressor that has most of them."""
    points = [point for run in section.runs if run.diverged is None for point in run.history]
    names = [
        name for point in sorted(points, key=lambda p: -len(p.information)) for name in point.information
    ]
    return list(dict.fromkeys(name.rpartition(" at ")[2] for name in names))


def _dashes(row: Row) -> str:
    return "--" if "+" in row.method else "-"


def _colours(section: Section) -> dict[Row, str]:
    """The recorded colours; a row without one, or with one that is taken, gets a free colour of the cycle."""
    found: dict[Row, str] = {}
    for row in section.rows:
        wanted = next((run.colour for run in row.runs if run.colour), COLOURS.get(row.method))
        if wanted and wanted not in found.values():
            found[row] = wanted
    free = [colour for colour in CYCLE if colour not in found.values()] or CYCLE
    others = [row for row in section.rows if row not in found]
    return found | {row: free[number % len(free)] for number, row in enumerate(others)}


def _cropped(values: list[float]) -> tuple[float, float]:
    low, high = min(values, default=0), max(values, default=100)
    margin = 0.06 * (high - low) or 1
    return low - margin, high + margin


def _teacher(section: Section) -> list[float]:
    return [] if section.teacher is None else [section.teacher]


def _label_ends(panel, section: Section, ends: list[tuple[float, str, str]], gap: float) -> None:
    """Draw the teacher as a line and write each (height, text, colour) at the right ends of all lines.

    gap: distance between two texts, a share of the axis.
    """
    for height in _teacher(section):
        panel.axhline(height, **TEACHER)
        ends = [*ends, (height, "Teacher", COLOURS["teacher"])]
    low, high = panel.get_ylim()
    ends = sorted(ends, key=lambda end: end[0])
    where = panel.get_yaxis_transform()  # x as a share of the axis, y as data
    places = _spread([height for height, _, _ in ends], gap * (high - low), high)
    for (height, text, colour), place in zip(ends, places):
        panel.annotate(
            f"{height:.1f} {text}",
            xy=(1, height),
            xytext=(1.05, place),
            xycoords=where,
            textcoords=where,
            color=colour,
            va="center",
            size=8,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkB": 0, "relpos": (0, 0.5)},
        )


def _spread(heights: list[float], gap: float, top: float) -> list[float]:
    """Ascending heights up to `top`, moved as little as possible to be `gap` apart (isotonic regression)."""
    blocks: list[tuple[float, int]] = []  # (mean of height - place * gap, how many)
    for place, height in enumerate(heights):
        level, count = height - place * gap, 1
        while blocks and blocks[-1][0] > level:
            before, number = blocks.pop()
            level, count = (before * number + level * count) / (number + count), number + count
        blocks.append((level, count))
    levels = [level for level, count in blocks for _ in range(count)]
    return [min(level + n * gap, top - (len(levels) - 1 - n) * gap) for n, level in enumerate(levels)]


def _last_epoch(section: Section) -> str:
    seeds = _seeds(section, "mean and standard deviation")
    return f"{section.title}, {section.evaluated_on} split: last epoch, {seeds}"


def _seeds(section: Section, what: str) -> str:
    seeds = len({run.seed for run in section.runs})
    return f"{what} over {seeds} seeds" if seeds > 1 else "one seed"


def _legend(figure, section: Section) -> None:
    """What the marks mean, below the figure."""
    handles = {}
    for accuracy in _teacher(section):
        given = "" if section.given_teacher is None else " (given)"
        handles[f"Teacher{given} {accuracy:.2f}"] = Line2D([], [], **TEACHER)
    if any(published(section, row.method, column)[0] for row in section.rows for column in section.columns):
        handles["paper"] = Line2D([], [], color="0.3", marker="D", linestyle="", fillstyle="none")
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
