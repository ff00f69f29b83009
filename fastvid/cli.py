"""The command line, derived from the fields of the configuration. Commands import torch only if needed."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import os
import sys
import types
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from signal import SIGINT
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import fastvid
from fastvid import signals
from fastvid.config import OPTION_GROUPS, Grid, TrainConfig
from fastvid.errors import InputError, Interrupted
from fastvid.results import RunResult


def main(argv: list[str] | None = None) -> int:
    """Run `fastvid ARGV`. Returns the exit code.

    0: done.  1: done, but students diverged.  2: bad input.  130, 143, 129: ended by SIGINT, SIGTERM, SIGHUP.
    """
    signals.raise_on_signal()
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal without ± shows ?
        args, unknown = _parser().parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except InputError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # the reader of a pipe such as `fastvid report DIR | head` is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        name, reason = error.filename or "a file", error.strerror or error
        return _refuse(f"{name}: {reason}: check the path and its permissions")
    except Interrupted as error:
        _tell(f"fastvid: {error}")
        return 128 + error.number
    except KeyboardInterrupt as error:
        _tell("fastvid: interrupted: the same command resumes from the last saved state")
        return 128 + getattr(error, "number", SIGINT)


def program() -> NoReturn:
    """Entry point of the process `fastvid`."""
    try:
        code = main()
        signals.ignore()
    except KeyboardInterrupt as error:  # a signal after the last line of main
        signals.ignore()
        code = 128 + getattr(error, "number", SIGINT)
    sys.exit(code)


def _refuse(message: str) -> int:
    _tell(f"fastvid: error: {' '.join(message.split())}")
    return 2


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # stderr is closed
        print(line, file=sys.stderr)


def _train(args: argparse.Namespace) -> int:
    config = _from_args(TrainConfig, args)
    from fastvid.train import train

    return _code(train(config))


def _reproduce(args: argparse.Namespace) -> int:
    grid, config = _from_args(Grid, args), _from_args(TrainConfig, args)
    from fastvid.reproduce import reproduce

    found = reproduce(grid, config)
    if found is None:
        return 0
    _report(argparse.Namespace(folder=config.out))
    return _code(found)


def _code(found: Iterable[RunResult]) -> int:
    """Exit code: 1 if students diverged, else 0. Prints one line for each student that diverged."""
    diverged = [result for result in found if result.diverged]
    for result in diverged:
        subset = f"{result.per_class} per class" if result.per_class else "full"
        _tell(f"fastvid: {result.method} ({subset}, seed {result.seed}) diverged in {result.diverged}")
    return 1 if diverged else 0


def _report(args: argparse.Namespace) -> None:
    from fastvid.report import report

    print(report(Path(args.folder)))


def _doctor(args: argparse.Namespace) -> None:
    from fastvid.doctor import doctor

    print(doctor(args.data))


def _parser() -> argparse.ArgumentParser:
    purpose = (
        "Distil a teacher into students by VID, KD, FitNet and AT, and reproduce the table of the VID paper."
    )
    parser = _OneLineParser(prog="fastvid", description=purpose)
    parser.add_argument("--version", action="version", version=f"fastvid {fastvid.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_OneLineParser)

    purpose = "train one group: any methods, one teacher, one subset, one seed"
    train = commands.add_parser("train", help=purpose)
    _add_options(train, TrainConfig)
    train.set_defaults(run=_train, parser=train)

    purpose = "train the grid methods x fractions x seeds, then report"
    reproduce = commands.add_parser("reproduce", help=purpose)
    _add_options(reproduce, Grid)
    _add_options(reproduce, TrainConfig, leave_out=("method", "per_class", "seed", "profile"))
    reproduce.set_defaults(run=_reproduce, parser=reproduce)

    purpose = "render table.md, table.csv and plots from the results in a folder"
    report = commands.add_parser("report", help=purpose)
    report.add_argument("folder", metavar="DIR", help="output folder of train or reproduce")
    report.set_defaults(run=_report, parser=report)

    purpose = "report about this machine: versions, device, loader, kernels, data"
    doctor = commands.add_parser("doctor", help=purpose)
    purpose = "folder that may hold data sets (default: %(default)s)"
    doctor.add_argument("--data", default=TrainConfig.data, metavar="DIR", help=purpose)
    doctor.set_defaults(run=_doctor, parser=doctor)
    return parser


class _OneLineParser(argparse.ArgumentParser):
    """Reports errors on one line. Options cannot be abbreviated, so that new options never break a script."""

    def __init__(self, **settings):
        formatter = partial(argparse.HelpFormatter, max_help_position=32)
        super().__init__(**settings, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def _add_options(
    parser: argparse.ArgumentParser, options: type, prefix: str = "", leave_out: tuple[str, ...] = ()
) -> None:
    """Add one option per field of a dataclass and of the dataclasses in it (`vid.weight` is --vid-weight)."""
    hints, docs = get_type_hints(options), _field_docs(options)
    group = parser.add_argument_group(prefix.rstrip("_") or None, inspect.getdoc(options) if prefix else None)
    for field in dataclasses.fields(options):
        if field.name in leave_out:
            continue
        if field.name in OPTION_GROUPS:
            _add_options(parser, hints[field.name], prefix=f"{field.name}_")
            continue
        flag, kind = "--" + (prefix + field.name).replace("_", "-"), _without_none(hints[field.name])
        text = docs[field.name].replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action="store_true", help=text)
            continue
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        if default is not None:
            text = f"{text} (default: {default})"
        parse = _list_of(kind) if get_origin(kind) is tuple else kind
        settings: dict[str, Any] = {"type": parse, "metavar": _metavar(field.name, kind)}
        if get_origin(kind) is Literal:
            settings = {"choices": get_args(kind)}
        group.add_argument(flag, default=field.default, help=text, **settings)


def _from_args(options: type, args: argparse.Namespace, prefix: str = ""):
    """The dataclass `options` with the values of the command line."""
    hints, given = get_type_hints(options), vars(args)
    values = {}
    for field in dataclasses.fields(options):
        if field.name in OPTION_GROUPS:
            values[field.name] = _from_args(hints[field.name], args, prefix=f"{field.name}_")
        elif prefix + field.name in given:
            values[field.name] = given[prefix + field.name]
    return options(**values)


@cache
def _field_docs(options: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    (node,) = ast.parse(inspect.getsource(options)).body
    pairs = zip(node.body, node.body[1:])
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (arg for arg in get_args(kind) if arg is not type(None))
    return kind


def _list_of(kind: Any):
    element = get_args(kind)[0]

    def parse(text: str) -> tuple:
        return tuple(element(part.strip()) for part in text.split(","))

    parse.__name__ = f"list of {element.__name__}"
    return parse


def _metavar(name: str, kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "A,B,..."
    names = {"data": "DIR", "out": "DIR", "teacher": "FILE", "device": "NAME"}
    return names.get(name, "N" if kind is int else "X")
