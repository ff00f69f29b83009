"""The command line, derived from the fields of the configuration. Imports torch only when a command needs it."""

from __future__ import annotations

import argparse
import ast
import atexit
import contextlib
import dataclasses
import inspect
import os
import sys
import types
from functools import cache, partial
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import fastvid
from fastvid import results, signals
from fastvid.config import OPTION_GROUPS, Grid, TrainConfig
from fastvid.errors import InputError, Interrupted, RankLost, is_out_of_memory


def main(argv: list[str] | None = None) -> int:
    """Run `fastvid ARGV`. Returns the exit code: 0, 2 for bad input, 130 after SIGINT, 143 after SIGTERM."""
    signals.raise_on_sigterm()
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal without ± shows ?
        args, unknown = _parser().parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        args.run(args)
        sys.stdout.flush()
        return 0
    except InputError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # `fastvid report DIR | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _refuse(
            f"{error.filename or 'a file'}: {error.strerror or error}: check the path and its permissions"
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _refuse(
            "out of memory: set a smaller --batch-size, train fewer methods at once, or take smaller networks"
        )
    except RankLost as error:
        _tell(f"fastvid: {error}")
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        message = (
            str(error)
            if isinstance(error, Interrupted)
            else "interrupted: the same command starts again where it was"
        )
        if message:
            _tell(f"{_who()}: {message}")
        return _signal_code(error)


def program() -> NoReturn:
    """The process `fastvid`, or one of those that torchrun started."""
    try:
        code = main()
        signals.ignore()  # it ends
    except KeyboardInterrupt as error:  # between those two lines
        signals.ignore()
        code = _signal_code(error)
    if (
        "TORCHELASTIC_RUN_ID" in os.environ
    ):  # else it could abort on its way out, over a thread of gloo that is still there
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _signal_code(error: Interrupted | KeyboardInterrupt) -> int:
    if isinstance(error, Interrupted):
        return 128 + error.number
    return 128 + (SIGTERM if isinstance(error, signals.Terminated) else SIGINT)


def _who() -> str:
    """This process; of those that torchrun has started, the first speaks for all unless it cannot."""
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    return "fastvid" if rank == "0" else f"fastvid, rank {rank}"


def _refuse(message: str) -> int:
    _tell(f"{_who()}: error: {' '.join(message.split())}")
    return 2


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody can be told
        print(line, file=sys.stderr)


def _train(args: argparse.Namespace) -> None:
    config = _from_args(TrainConfig, args)
    with _holding(config):
        from fastvid.train import train

        train(config)


def _reproduce(args: argparse.Namespace) -> None:
    grid, config = _from_args(Grid, args), _from_args(TrainConfig, args)
    with _holding(config):
        from fastvid.reproduce import reproduce

        if reproduce(grid, config):
            _report(argparse.Namespace(folder=config.out))


def _holding(config: TrainConfig) -> contextlib.AbstractContextManager:
    """Hold the output folder from now on: before the seconds that importing torch takes. Of several ranks the first one does."""
    return (
        results.exclusive(results.open_folder(Path(config.out)))
        if _who() == "fastvid"
        else contextlib.nullcontext()
    )


def _report(args: argparse.Namespace) -> None:
    from fastvid.report import report

    print(report(Path(args.folder)))


def _doctor(args: argparse.Namespace) -> None:
    from fastvid.doctor import doctor

    print(doctor(args.data))


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="fastvid",
        description="Train small students from a teacher (VID, and KD, FitNet, AT to compare with) and reproduce the paper's table.",
    )
    parser.add_argument("--version", action="version", version=f"fastvid {fastvid.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_OneLineParser)

    train = commands.add_parser(
        "train", help="train one group: any methods, one teacher, one subset, one seed"
    )
    _add_options(train, TrainConfig)
    train.set_defaults(run=_train, parser=train)

    reproduce = commands.add_parser(
        "reproduce", help="train the grid methods x fractions x seeds, then report"
    )
    _add_options(reproduce, Grid)
    _add_options(reproduce, TrainConfig, leave_out=("method", "per_class", "seed", "profile"))
    reproduce.set_defaults(run=_reproduce, parser=reproduce)

    report = commands.add_parser(
        "report", help="render table.md, table.csv and plots from the results in a folder"
    )
    report.add_argument("folder", metavar="DIR", help="output folder of train or reproduce")
    report.set_defaults(run=_report, parser=report)

    doctor = commands.add_parser(
        "doctor", help="say what this machine has: versions, device, loader, kernels, data"
    )
    doctor.add_argument(
        "--data",
        default=TrainConfig.data,
        metavar="DIR",
        help="where to look for data sets (default: %(default)s)",
    )
    doctor.set_defaults(run=_doctor, parser=doctor)
    return parser


class _OneLineParser(argparse.ArgumentParser):
    """Errors are one line, as everywhere in fastvid; options cannot be abbreviated, so that new ones break no script."""

    def __init__(self, **settings):
        super().__init__(
            **settings,
            allow_abbrev=False,
            formatter_class=partial(argparse.HelpFormatter, max_help_position=32),
        )

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def _add_options(
    parser: argparse.ArgumentParser, options: type, prefix: str = "", leave_out: tuple[str, ...] = ()
) -> None:
    """One --option per field of a dataclass, and of the dataclasses in it (`vid.weight` is --vid-weight)."""
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
        settings: dict[str, Any] = {
            "type": _list_of(kind) if get_origin(kind) is tuple else kind,
            "metavar": _metavar(field.name, kind),
        }
        if get_origin(kind) is Literal:
            settings = {"choices": get_args(kind)}
        group.add_argument(
            flag,
            default=field.default,
            help=text if default is None else f"{text} (default: {default})",
            **settings,
        )


def _from_args(options: type, args: argparse.Namespace, prefix: str = ""):
    """The dataclass with what the command line gave."""
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
    return {
        field.target.id: text.value.value
        for field, text in zip(node.body, node.body[1:])
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
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
    return {"data": "DIR", "out": "DIR", "teacher": "FILE", "device": "NAME"}.get(
        name, "N" if kind is int else "X"
    )
