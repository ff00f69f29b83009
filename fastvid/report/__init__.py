"""The report of one or several output folders: table.md, table.csv, runs.csv and plots from results.jsonl."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from fastvid import results
from fastvid.errors import InputError
from fastvid.files import write_atomic
from fastvid.report import table
from fastvid.report.section import Section, sections
from fastvid.results import RunResult

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def report(folders: Path | Iterable[Path], out: Path | None = None) -> str:
    """Write tables and plots into `out`; return the text for the terminal: the tables, the paths, remarks.

    `folders` is one output folder, and `out` may be omitted, or several folders, whose runs share one table:
    the settings in which the folders differ are part of the row names. A plot that fails costs a remark, not
    the table. Raises InputError if there is nothing to report, if the results cannot share a table, or if the
    disk is full.
    """
    paths = [Path(folders)] if isinstance(folders, (str, os.PathLike)) else list(map(Path, folders))
    if out is None and len(paths) != 1:
        raise InputError("a report of several folders needs a folder of its own: give --out")
    out = Path(out or paths[0])
    read = [_read(path) for path in paths]
    found, remarks = [runs for runs, _ in read], [remark for _, remarks in read for remark in remarks]
    _refuse_mixture(", ".join(map(str, paths)), [run for runs in found for run in runs], one_folder=False)
    parts = sections(*found)
    markdown = "\n".join(map(table.markdown, parts))
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        tables = {"table.md": markdown, "table.csv": table.as_csv(parts), "runs.csv": table.runs_csv(parts)}
        for name, content in tables.items():
            write_atomic(out / name, content.encode())
            written.append(f"wrote {out / name}")
        plotted, failed = _plot(parts, out)
        written, remarks = written + plotted, failed + remarks
    except (InputError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if cause.errno in _READ_ONLY:
            remarks = [f"{out} is read-only ({cause.strerror}): nothing was written there", *remarks]
        elif isinstance(error, InputError):
            raise
        else:
            raise InputError(f"{out}: cannot write there: {cause.strerror}; choose another --out") from error
    return "\n".join([markdown, *written, *remarks])


def _plot(parts: list[Section], out: Path) -> tuple[list[str], list[str]]:
    """(a line for each plot written, a remark for each cause of failure)."""
    written, failed = [], []
    try:
        from fastvid.report import plots

        for part in parts:
            suffix = f"-{part.dataset}-{part.evaluated_on}" if len(parts) > 1 else ""
            for name, draw in plots.plots_of(part).items():
                path = out / f"{name}{suffix}.png"
                for kind, content in plots.render(draw, part).items():
                    write_atomic(path.with_suffix(f".{kind}"), content)
                written.append(f"wrote {path}, .svg, .pdf")
    except Exception as error:  # whatever matplotlib raises, the tables are complete
        missing = isinstance(error, ModuleNotFoundError) and error.name == "matplotlib"
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        remedy = "no plots: pip install 'fastvid-distill[plot]'"
        failed.append(remedy if missing else f"plots are missing, the tables are complete: {cause}")
    return written, failed


def _read(folder: Path) -> tuple[list[RunResult], list[str]]:
    remedy = "give the --out folder of `fastvid train` or `fastvid reproduce`"
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: {remedy}")
    path = folder / results.FILE
    if not path.is_file():
        raise InputError(f"{folder} holds no {results.FILE}, so it is no output folder of fastvid: {remedy}")
    found, remarks = results.read(folder)
    if not found:
        unreadable = f", only {len(remarks)} unreadable line(s)" if remarks else ""
        raise InputError(
            f"{path} holds no finished result yet{unreadable}: let a run finish, then report again"
        )
    _refuse_mixture(str(path), found, one_folder=True)
    return found, remarks


def _refuse_mixture(where: str, runs: list[RunResult], one_folder: bool) -> None:
    """Raise InputError for results that cannot share a table."""
    for dataset, split in sorted({(run.dataset, run.evaluated_on) for run in runs}):
        part = [run for run in runs if (run.dataset, run.evaluated_on) == (dataset, split)]
        mixed = {f"versions of {dataset}": {run.data_sha256 for run in part}}
        if one_folder:  # between folders, these two are settings that the row names show
            used = {run.teacher_sha256 for run in part} - {None}
            trained = {run.weights_sha256 for run in part if run.method == "teacher"} - {""}
            # a folder may hold teachers with several seeds, of which the students use one
            mixed["teachers"] = used | (trained if used - trained else set())
            mixed["versions of fastvid"] = {str(run.environment.get("fastvid")) for run in part}
        for what, values in mixed.items():
            if len(values) > 1:
                names = ", ".join(sorted(value[:12] for value in values))
                raise InputError(
                    f"{where}: results of {len(values)} {what} ({names}); these cannot share one table; "
                    "keep each in its own output folder"
                )
