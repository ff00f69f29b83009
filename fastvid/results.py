"""What a finished run leaves behind: one JSON line. Imports neither torch nor NumPy."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from filelock import FileLock, Timeout

from fastvid.errors import InputError
from fastvid.files import is_alive, remove_leftovers, write_atomic

FILE = "results.jsonl"
LOCK = ".lock"
_CHECKSUM = "sha256"  # of the rest of a line
_HOLDER = ".lock.holder"  # who has it: a process that tries to lock a file may empty it


@dataclass(frozen=True)
class Evaluation:
    """One point of a learning curve."""

    epoch: int
    """epochs completed"""
    accuracy: float
    """top-1 in percent, on the evaluation split"""
    task_loss: float
    """mean of the task term over the epoch"""
    transfer_loss: float
    """mean of the weighted transfer term over the epoch"""
    variances: dict[str, list[float]]
    """per tap of VID: least, median and largest learned variance"""
    information: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """per regressor, such as "vid at stem": explained variance, and information bound in nats per element"""


@dataclass(frozen=True)
class RunResult:
    """One network, trained to the end."""

    dataset: str
    method: str
    percent: float
    """share of the training split that was used"""
    per_class: int | None
    """images of each class; null: all"""
    seed: int
    accuracy: float | None
    """of the last epoch, top-1 in percent; null: it diverged"""
    best_accuracy: float | None
    """best of the evaluated epochs: chosen on the evaluation split, so never the headline"""
    evaluated_on: str
    """test, or validation: a part of the training subset"""
    train_images: int
    steps: int
    seconds: float
    """of training alone, shared by the students of the group: no evaluation, no start-up"""
    images_per_second: float
    group: list[str]
    """methods trained together, with one teacher forward"""
    history: list[Evaluation]
    weights: str
    """file of the final weights, beside this one"""
    weights_sha256: str
    data_sha256: str
    """of the whole training split, and of the test split where that is evaluated on"""
    teacher_sha256: str | None
    """of the teacher's weight file; null: trained without one"""
    teacher_accuracy: float | None
    """of that teacher on the evaluation split, in percent"""
    config: dict
    """the whole TrainConfig of this run"""
    environment: dict
    """versions, device, loader, engine and number of ranks"""
    preparation_seconds: float | None = None
    """compiling, warming up and capturing, outside `seconds`; of the whole group"""
    evaluation_seconds: float | None = None
    """of this run, outside `seconds`"""
    checkpoint_seconds: float | None = None
    """writing resume states, outside `seconds`"""
    diverged: str | None = None
    """when and how, such as "epoch 12: transfer loss inf"; such a run has no accuracy and no weights"""
    title: str = ""
    """display name of the method, such as KD+VID"""
    colour: str = ""
    """of the method in plots"""
    date: str = ""
    """ISO 8601, UTC"""
    command: str = ""
    """the command line that makes this run again"""
    peak_memory: int | None = None
    """bytes, so far: of tensors on a GPU, of the whole process on a CPU"""

    def key(self) -> tuple:
        """What no two lines of one results file share."""
        return self.dataset, self.method, self.per_class, self.seed


def open_folder(path: Path) -> Path:
    """Make `path` an output folder, or check that it is one. Raises InputError when it cannot be written or holds other things."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = {
            entry.name for entry in path.iterdir() if not entry.name.startswith(".")
        }  # looked at once: another may be starting too
        if names and FILE not in names:
            raise InputError(
                f"{path} holds files but no {FILE}, so it is no output folder of fastvid: give --out a new or an empty folder"
            )
        with open(path / FILE, "ab"):
            pass
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"{path}: cannot write there: {error.strerror or error}; choose another --out"
        ) from error
    return path


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the output folder; nested calls of one process share it. Raises InputError that names the process which holds it."""
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        holder = _holder(folder)
        raise InputError(
            f"another fastvid{holder} is at work in {folder}: wait for it, or give another --out"
        ) from error
    try:
        if lock.lock_counter == 1:
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            write_atomic(
                folder / _HOLDER, f"process {os.getpid()} on {platform.node()}, since {started}\n".encode()
            )
            remove_leftovers(folder)
        yield
    finally:
        if lock.lock_counter == 1:
            with contextlib.suppress(OSError):
                (folder / _HOLDER).unlink()
        lock.release()


def _holder(folder: Path) -> str:
    """Who has the folder, in parentheses; it says so just after it has taken it. One that was killed left its name behind."""
    until = time.monotonic() + 1
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            text = (folder / _HOLDER).read_text(errors="replace").strip()
            process = re.match(rf"process (\d+) on {re.escape(platform.node())},", text)
            if not process or is_alive(int(process[1])):
                return f" ({text})"
        time.sleep(0.02)
    return ""


def append(folder: Path, result: RunResult) -> None:
    """Add one line, with its checksum, to the folder's results, whole or not at all. A torn last line of another program is ended first."""
    path = folder / FILE
    entry = dataclasses.asdict(result)
    line = json.dumps({**entry, _CHECKSUM: _sha256(entry)}, allow_nan=False) + "\n"
    try:
        with FileLock(folder / ".results.lock"):  # several ranks may share the folder
            before = path.read_bytes() if path.exists() else b""
            write_atomic(
                path, before + (b"\n" if before and not before.endswith(b"\n") else b"") + line.encode()
            )
    except OSError as error:
        raise InputError(
            f"{path}: cannot write: {error.strerror or error}; see to the folder, then start again"
        ) from error


def read(folder: Path) -> tuple[list[RunResult], list[str]]:
    """(results in file order, notes on lines that could not be read). A missing file holds no results.

    Raises InputError when whole lines are there but none is a result: the file is another program's or another version's.
    """
    path = folder / FILE
    results, notes = [], []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            results.append(_parse(json.loads(line)))
        except (ArithmeticError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            notes.append(f"{path}, line {number}: not a whole result, skipped; its run will be made again")
    if not results and any(line.strip() for line in lines[:-1]):  # the last one may be torn
        raise InputError(f"{path} holds no result that this version of fastvid can read: give another folder")
    return results, notes


def _parse(entry: dict) -> RunResult:
    if entry.pop(_CHECKSUM) != _sha256(entry):
        raise ValueError("its checksum does not match")
    result = RunResult(**{**entry, "history": [Evaluation(**point) for point in entry["history"]]})
    for part in (result, *result.history):
        check_types(part)
    if not (result.history or result.diverged) or result.evaluated_on not in ("test", "validation"):
        raise ValueError("no learning curve, or none on a known split")
    return result


def check_types(part: RunResult | Evaluation) -> None:
    """Raises TypeError for a value that is not of its field's type."""
    for name, kind in get_type_hints(type(part)).items():
        if not _is_a(getattr(part, name), kind):
            raise TypeError(f"{name} is {getattr(part, name)!r}")


def _is_a(value: object, kind: Any) -> bool:
    """Whether a JSON value is of an annotated type; a float is a finite number."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(entry, get_args(kind)[0]) for entry in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_is_a(entry, get_args(kind)[1]) for entry in value.values())
    if get_args(kind):  # X | None
        return any(_is_a(value, option) for option in get_args(kind))
    return isinstance(value, kind) and not isinstance(value, bool)


def _sha256(entry: dict) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True, allow_nan=False).encode()).hexdigest()
