"""The notes below a table: what a reader must know before using the numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from fastvid import results
from fastvid.config import CIRCUMSTANCES, PROTOCOLS, Protocol, TrainConfig
from fastvid.report.published import is_published
from fastvid.report.section import EMPTY, Column, Section, as_text, listed, network_of, title
from fastvid.results import RunResult

_NO_RECIPE = {  # settings that other parts of the report show, and evaluations, which change no result
    *("dataset", "method", "per_class", "validation_per_class", "seed", "protocol", "epochs", "batch_size"),
    *("precision", "evaluations", "teacher_depth", "teacher_width", "student_depth", "student_width"),
    *CIRCUMSTANCES,
}


def notes(section: Section) -> list[str]:
    seeds = sorted({run.seed for run in section.runs})
    number = f"{len(seeds)} seed{'s' * (len(seeds) > 1)} ({listed(seeds)})"
    protocol = section.setting("protocol")
    deviations = [*_lengths_other_than(protocol, section), *_recipe(section)]
    found = [
        f"Data set {section.title}, {section.evaluated_on} split, {number}. The last epoch is the headline. "
        f"{EMPTY}: not run here, or never published.",
        f"Protocol `{protocol}`: {_lengths(section, section.columns)}; batch size "
        f"{section.setting('batch_size')}; {section.setting('precision')}.{_teacher_epochs(section)}"
        + (f" **Deviation from protocol `{protocol}`: {'; '.join(deviations)}.**" if deviations else ""),
    ]
    if section.given_teacher is not None:
        accuracies = sorted(
            {run.teacher_accuracy for run in section.runs if run.teacher_accuracy is not None}
        )
        measured = listed(f"{accuracy:.2f}" for accuracy in accuracies)
        found.append(
            f"{title('teacher', ())} {network_of('teacher', section.runs)} was given, not trained here: "
            f"{measured} on the {section.evaluated_on} split."
        )
    found += [*_options(section), *_diverged(section), *_comparison(section)]
    devices = listed(
        f"{run.environment.get('device')}, torch {run.environment.get('torch')}" for run in section.runs
    )
    seconds = f"{_seconds(section):,.0f} s of training, without start-up and evaluation"
    found.append(f"Trained on {devices}: {seconds}.")
    commits = dict.fromkeys(str(run.environment.get("commit")) for run in section.runs)
    if len(commits) > 1:
        found.append(f"Trained by several commits of fastvid: {listed(commits)}.")
    if section.repeats:
        lines = f"{section.repeats} line(s) of {results.FILE}"
        found.append(f"{lines} repeat a method, subset and seed: only the first of each counts.")
    return found


def _lengths(section: Section, columns: list[Column]) -> str:
    return ", ".join(f"{_epochs(section, column)} epochs on {column.percent:.3g} %" for column in columns)


def _epochs(section: Section, column: Column) -> str:
    return listed(run.config.get("epochs") for run in _students(section, column))


def _students(section: Section, column: Column) -> list[RunResult]:
    """The runs of a column without the teacher; the teacher if the teacher is alone there."""
    return [run for row in section.students for run in row.cell(column)] or [
        run for row in section.rows for run in row.cell(column)
    ]


def _teacher_epochs(section: Section) -> str:
    """Shown only if the teacher's number of epochs differs from that of the students on the whole split."""
    epochs = sorted({run.config.get("epochs") for run in section.runs if run.method == "teacher"})
    differ = epochs and listed(epochs) != _epochs(section, section.columns[0])
    return f" The teacher: {listed(epochs)} epochs." if differ else ""


def _lengths_other_than(name: str, section: Section, columns: Iterable[Column] = ()) -> Iterator[str]:
    """Epochs and batch sizes that differ from those of a protocol."""
    if protocol := PROTOCOLS.get(name):
        for column in columns or section.columns:
            wanted = _epochs_of(protocol, _students(section, column)[0])
            if (epochs := _epochs(section, column)) != wanted:
                yield f"{epochs} epochs instead of {wanted} on {column.percent:.3g} %"
        if (batch := section.setting("batch_size")) != str(protocol.batch_size):
            yield f"batch size {batch} instead of {protocol.batch_size}"


def _recipe(section: Section) -> Iterator[str]:
    """Settings of the recipe that differ from their defaults."""
    for name, default in json.loads(json.dumps(asdict(TrainConfig()))).items():
        values = [run.config.get(name, default) for run in section.runs]
        recipe = name not in _NO_RECIPE and default is not None and not isinstance(default, dict)
        if recipe and any(value != default for value in values):
            yield f"{name.replace('_', ' ')} {listed(values)} instead of {as_text(default)}"


def _epochs_of(protocol: Protocol, run: RunResult) -> str:
    if run.method == "teacher":
        return str(protocol.teacher_epochs)
    return str(protocol.full_epochs if run.per_class is None else protocol.reduced_epochs)


def _options(section: Section) -> Iterator[str]:
    """The options of every transfer term in the table."""
    terms: dict[str, list[str]] = {}
    for run in section.runs:
        for part, options in run.config.items():
            if part in run.method.split("+") and isinstance(options, dict):
                hidden = {"hint_share"} if options.get("schedule") == "joint" else set()
                shown = [f"{name} {as_text(value)}" for name, value in options.items() if name not in hidden]
                terms.setdefault(part, []).append(", ".join(shown))
    names = list(dict.fromkeys(name for run in section.runs for name in run.config))
    if terms:
        terms = {part: terms[part] for part in sorted(terms, key=names.index)}
        named = {
            title(part, (run for run in section.runs if run.method == part)): terms[part] for part in terms
        }
        yield "; ".join(f"{name}: {listed(texts, between=' or ')}" for name, texts in named.items()) + "."


def _diverged(section: Section) -> Iterator[str]:
    found = [
        f"{row.title}, {column.percent:.3g} %, seed {run.seed} ({run.diverged})"
        for row in section.rows
        for column in section.columns
        for run in row.diverged(column)
    ]
    if found:
        yield f"Diverged, and left out of means, spreads and differences: {'; '.join(found)}."


def _comparison(section: Section) -> Iterator[str]:
    """Where the published columns come from, and whether ours are comparable with them."""
    shared = [column for column in section.columns if is_published(section, column)]
    if shared:
        seed = PROTOCOLS["seed"]
        other = [*_lengths_other_than("seed", section, shared)]
        yield (
            "paper: Ahn et al., CVPR 2019, number of epochs unknown. seed repo: its newest README, mean of 3 "
            f"runs, protocol `seed`: {seed.full_epochs} epochs on 100 %, {seed.reduced_epochs} on less, "
            f"batch size {seed.batch_size}. "
        ) + (
            f"**Our numbers are not comparable with either: {'; '.join(other)}.**"
            if other
            else "Ours have the epochs and the batch size of the seed repository; the paper's may differ."
        )


def _seconds(section: Section) -> float:
    """Every run of a group carries the seconds of the whole group, so a group counts once."""
    groups: dict[tuple, float] = {}
    for run in section.runs:
        group = run.config.get("out"), run.per_class, run.seed, tuple(run.group)
        groups[group] = max(run.seconds, groups.get(group, 0.0))
    return sum(groups.values())
