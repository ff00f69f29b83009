"""The plots of an output folder: learning curves, and accuracy against labels per class. Needs matplotlib, which is optional."""

from __future__ import annotations

import io
import math
from statistics import mean, stdev

from fastvid.results import RunResult
from fastvid.table import Section, column_title, short_name, subset_size

COLOURS = {  # Okabe and Ito's, which colour-blind people can tell apart, without their yellow, which is faint on white
    "teacher": "#000000",
    "student": "#8C8C8C",
    "kd": "#56B4E9",
    "fitnet": "#009E73",
    "at": "#E69F00",
    "vid": "#D55E00",
    "kd+at": "#CC79A7",
    "kd+vid": "#0072B2",
}
SPARE_COLOURS = ("#882255", "#999933", "#332288", "#117733")  # for other sums, in their order of appearance


def curves(section: Section) -> bytes:
    """A PNG with one panel per subset, smallest first: accuracy against epochs, mean over seeds and the range between them."""
    return _png(_draw_curves, section)


def bars(section: Section) -> bytes:
    """A PNG of last-epoch accuracies against labels per class: a bar per method with its sd, the paper's number hatched beside it."""
    return _png(_draw_bars, section)


def _png(draw, section: Section) -> bytes:
    """`draw(figure, section)` as a PNG, by Agg alone: no display, no pyplot, no state left behind."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "hatch.linewidth": 0.6,
        }
    ):
        figure = Figure(layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        draw(figure, section)
        figure.savefig(content, format="png")
    return content.getvalue()


def _draw_curves(figure, section: Section) -> None:
    columns = section.columns[::-1]
    across = 2 if len(columns) == 4 else min(len(columns), 3)
    down = math.ceil(len(columns) / across)
    figure.set_size_inches(1.2 + 3.9 * across, 1.2 + 3.0 * down)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    handles: dict[str, object] = {}
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    for place, (column, panel) in enumerate(zip(columns, panels)):
        handles |= _draw_panel(panel, section, column)
        if place % across == 0:
            panel.set_ylabel(f"accuracy on the {section.evaluated_on} split, %")
        if place + across >= len(columns):
            panel.set_xlabel("epochs (dotted: the learning rate drops)")
    figure.suptitle(f"{section.dataset}: learning curves, " + _over_seeds(section, "mean and range"))
    _legend(figure, section, handles)


def _draw_panel(panel, section: Section, column: RunResult) -> dict[str, object]:
    """Returns one legend handle per method drawn."""
    handles, late = {}, []
    length = max((run.config.get("epochs") or 1) for run in section.runs if run.per_class == column.per_class)
    for method in section.methods:
        points: dict[int, list[float]] = {}
        for point in (point for run in section.cell(method, column) for point in run.history):
            points.setdefault(point.epoch, []).append(point.accuracy)
        if points:
            epochs, values = zip(*sorted(points.items()))
            colour, marker = _colour(section, method), "o" if len(epochs) < 10 else None
            panel.fill_between(
                epochs, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.18, linewidth=0
            )
            (handles[method],) = panel.plot(
                epochs,
                list(map(mean, values)),
                color=colour,
                linestyle="--" if "+" in method else "-",
                linewidth=1.4,
                marker=marker,
                markersize=3,
            )
            late += [accuracy for epoch, v in points.items() if epoch > 0.1 * length for accuracy in v]
    if section.given_teacher is not None and column.per_class is None:
        handles["teacher"] = _draw_given_teacher(panel, section)
        late.append(section.given_teacher)
    students_length = section.followers(column)[0].config.get("epochs") or length
    for milestone in column.config.get("milestones", ()):
        panel.axvline(milestone * students_length, color="0.6", linestyle=":", linewidth=0.8, zorder=0)
    panel.set_xlim(0, length * 1.01)
    if late:  # the first tenth may leave the panel below, so that the ends can be told apart
        margin = 0.06 * (max(late) - min(late)) or 1
        panel.set_ylim(min(late) - margin, max(late) + margin)
    panel.set_title(column_title(column))
    panel.grid(axis="y", color="0.92")
    return handles


def _draw_bars(figure, section: Section) -> None:
    from matplotlib.patches import Patch

    columns, axes, left, ticks, handles = section.columns[::-1], figure.subplots(), 0, [], {}
    groups = [[method for method in section.methods if section.cell(method, column)] for column in columns]
    for column, group in zip(columns, groups):
        ticks.append(left + (len(group) - 1) / 2)
        for place, method in enumerate(group, start=left):
            handles[method] = _draw_bar(axes, section, method, column, place)
        left += len(group) + 1
    if section.given_teacher is not None:
        handles["teacher"] = _draw_given_teacher(axes, section)
    spare = max(0, 6 - left) / 2  # a lone bar shall not fill the figure
    figure.set_size_inches(min(14, max(5, 1.2 + 0.42 * left)), 4.4)
    axes.set_xlim(-1 - spare, left - 1 + spare)
    axes.set_xticks(ticks, [f"{subset_size(column)}\n{column.percent:.3g} %" for column in columns])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("labelled training images")
    axes.set_ylim(0, 105)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(f"accuracy on the {section.evaluated_on} split, %")
    axes.grid(axis="y", color="0.92")
    axes.set_title(f"{section.dataset}: last epoch, " + _over_seeds(section, "mean and standard deviation"))
    if any(
        section.published(method, column)[0] for column, group in zip(columns, groups) for method in group
    ):
        handles["paper"] = Patch(facecolor="white", edgecolor="0.3", hatch="/////")
    _legend(figure, section, handles)


def _draw_bar(axes, section: Section, method: str, column: RunResult, place: float):
    accuracies = [run.accuracy for run in section.cell(method, column)]
    colour, paper = _colour(section, method), section.published(method, column)[0]
    width, shift = (0.52, 0.17) if paper else (0.8, 0.0)
    bar = axes.bar(
        place - shift,
        mean(accuracies),
        width,
        color=colour,
        yerr=stdev(accuracies) if len(accuracies) > 1 else None,
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    brightness = sum(bytes.fromhex(colour[1:])) / 765
    axes.text(
        place - shift,
        2,
        f"{mean(accuracies):.1f}",
        rotation=90,
        ha="center",
        va="bottom",
        fontsize=8,
        color="white" if brightness < 0.5 else "black",
    )
    if paper:
        axes.bar(place + 0.26, paper, 0.32, facecolor="white", edgecolor=colour, linewidth=0.8, hatch="/////")
    return bar


def _draw_given_teacher(axes, section: Section):
    return axes.axhline(section.given_teacher, color=COLOURS["teacher"], linestyle=(0, (6, 3)), linewidth=1.2)


def _colour(section: Section, method: str) -> str:
    others = [name for name in section.methods if name not in COLOURS]
    return COLOURS[method] if method in COLOURS else SPARE_COLOURS[others.index(method) % len(SPARE_COLOURS)]


def _over_seeds(section: Section, what: str) -> str:
    seeds = len({run.seed for run in section.runs})
    return f"{what} over {seeds} seeds" if seeds > 1 else "one seed"


def _legend(figure, section: Section, handles: dict[str, object]) -> None:
    """One for the whole figure, below it, in the order of the table."""
    names = [name for name in dict.fromkeys(("teacher", *section.methods, "paper")) if name in handles]
    given = {"teacher": "Teacher (given)"} if section.given_teacher is not None else {}
    labels = [given.get(name) or short_name(name) for name in names]
    rows = math.ceil(len(names) / figure.get_figwidth())  # an entry takes about an inch
    figure.legend(
        [handles[name] for name in names],
        labels,
        loc="outside lower center",
        ncols=math.ceil(len(names) / rows),
        columnspacing=1.4,
    )
