"""From the JSON lines of an output folder to table.md, table.csv, curves.png and accuracy.png."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fastvid import results, table
from fastvid.errors import InputError
from fastvid.files import write_atomic
from fastvid.results import RunResult


def report(folder: Path) -> str:
    """Write table.md, table.csv and the plots into `folder`; returns what the command line prints: the tables, the paths, remarks.

    Raises InputError when there is nothing to report or the files cannot be written.
    """
    found, remarks = _read(folder)
    try:
        markdown, files = _render(found)
    except (
        ArithmeticError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # what no checksum and no type rules out
        raise InputError(
            f"{folder / results.FILE} holds settings that fastvid never writes ({error}): take out the lines that are "
            "not its own"
        ) from error
    for name, content in files.items():
        write_atomic(folder / name, content)
    if not any(name.endswith(".png") for name in files):
        remarks = ["no plots: pip install 'fastvid-distill[plot]'", *remarks]
    return "\n".join([markdown, *(f"wrote {folder / name}" for name in files), *remarks])


def _render(found: list[RunResult]) -> tuple[str, dict[str, bytes]]:
    """The tables, and every file by its name. No plots without Matplotlib."""
    sections = table.sections(found)
    markdown = "\n".join(table.markdown(section) for section in sections)
    files = {"table.md": markdown.encode(), "table.csv": table.as_csv(sections).encode()}
    with contextlib.suppress(ImportError):
        from fastvid import plots

        for section in sections:
            suffix = f"-{section.dataset}-{section.evaluated_on}" if len(sections) > 1 else ""
            files[f"curves{suffix}.png"] = plots.curves(section)
            files[f"accuracy{suffix}.png"] = plots.bars(section)
    return markdown, files


def _read(folder: Path) -> tuple[list[RunResult], list[str]]:
    remedy = "give the --out folder of `fastvid train` or `fastvid reproduce`"
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: {remedy}")
    if not (folder / results.FILE).is_file():
        raise InputError(f"{folder} holds no {results.FILE}, so it is no output folder of fastvid: {remedy}")
    found, remarks = results.read(folder)
    if not found:
        unreadable = f", only {len(remarks)} unreadable line(s)" if remarks else ""
        raise InputError(
            f"{folder / results.FILE} holds no finished result yet{unreadable}: let a run finish, then report again"
        )
    for section in table.sections(found):
        _refuse_mixture(folder, section)
    return found, remarks


def _refuse_mixture(folder: Path, section: table.Section) -> None:
    """Raises InputError for results that fastvid would not have written into one folder."""
    taught_by = {run.teacher_sha256 for run in section.runs} - {None}
    trained = {
        run.weights_sha256 for run in section.runs if run.method == "teacher"
    }  # maybe with several seeds, of which one taught
    mixed = {
        "teachers": taught_by | (trained if taught_by - trained else set()),
        f"sets of {section.dataset}": {run.data_sha256 for run in section.runs},
        "versions of fastvid": {str(run.environment.get("fastvid")) for run in section.runs},
    }
    for what, values in mixed.items():
        if len(values) > 1:
            names = ", ".join(sorted(value[:12] for value in values))
            raise InputError(
                f"{folder / results.FILE} holds results of {len(values)} {what} ({names}), which belong into no common table: "
                "report each from a folder of its own"
            )
