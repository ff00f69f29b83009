"""The result of a run: one JSON line in OUT/results.jsonl, with a checksum. Imports neither torch nor NumPy.

A field that an older line lacks gets its default; a field that this version does not know is ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from fastvid.errors import InputError
from fastvid.files import locked, write_atomic

FILE = "results.jsonl"
_CHECKSUM = "sha256"


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
    """per tap of VID: smallest, median and largest learned variance"""
    information: dict[str, list[float]] = field(default_factory=dict)
    """per regressor, such as "vid at stem": explained variance 1 - S/(M·Var t), and nats per element"""


@dataclass(frozen=True)
class RunResult:
    """One network, trained to the end or until it diverged."""

    dataset: str
    method: str
    percent: float
    """share of the training split that was used"""
    per_class: int | None
    """images of each class; null: all"""
    seed: int
    accuracy: float | None
    """of the last epoch, top-1 in percent; null: diverged"""
    best_accuracy: float | None
    """best of the evaluated epochs: chosen on the evaluation split, so never the headline; null: diverged"""
    evaluated_on: str
    """test, or validation (a part of the training subset)"""
    train_images: int
    steps: int
    seconds: float
    """training time of the whole group, without start-up, evaluation and checkpoints"""
    images_per_second: float
    group: list[str]
    """methods trained together, with one teacher forward pass per batch"""
    history: list[Evaluation]
    weights: str
    """file of the final weights, in the same folder; "": diverged"""
    weights_sha256: str
    data_sha256: str
    """SHA-256 of the whole training split, and of the test split if it is the evaluation split"""
    teacher_sha256: str | None
    """SHA-256 of the teacher's weights file; null: trained without a teacher"""
    teacher_accuracy: float | None
    """accuracy of that teacher on the evaluation split, in percent"""
    config: dict
    """the whole TrainConfig of this run"""
    environment: dict
    """versions, commit, device, loader and engine"""
    preparation_seconds: float | None = None
    """compile and warm-up time of the whole group, not part of `seconds`"""
    evaluation_seconds: float | None = None
    """evaluation time of this run, not part of `seconds`"""
    checkpoint_seconds: float | None = None
    """time for writing resume states, not part of `seconds`"""
    peak_memory: int | None = None
    """peak of the process so far, in bytes: tensors on a GPU, all memory on a CPU"""
    diverged: str | None = None
    """where the run diverged, such as "epoch 12: transfer loss inf"; null: trained to the end"""
    title: str = ""
    """display name of the method, such as KD+VID"""
    colour: str = ""
    """plot colour of the method, such as #D55E00"""
    date: str = ""
    """end of the run, ISO 8601 in UTC"""
    command: str = ""
    """command line that made the run"""

    def key(self) -> tuple:
        """What identifies a run in one results file."""
        return self.dataset, self.method, self.per_class, self.seed


def open_folder(path: Path) -> Path:
    """Create the output folder `path`, or check that it is one. Raises InputError if it cannot be used."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        # listed once: another process may be starting in the same folder
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
        if names and FILE not in names:
            raise InputError(
                f"{path} holds files but no {FILE}, so it is no output folder of fastvid: "
                "give --out a new or an empty folder"
            )
        with open(path / FILE, "ab"), tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot write there: {reason}; choose another --out") from error
    return path


def append(folder: Path, result: RunResult) -> None:
    """Add one line to the results, completely or not at all. A torn last line gets its newline first."""
    path = folder / FILE
    entry = dataclasses.asdict(result)
    line = json.dumps({**entry, _CHECKSUM: _sha256(entry)}, allow_nan=False) + "\n"
    try:
        with locked(folder / ".results.lock"):  # several processes may share the folder
            before = path.read_bytes() if path.exists() else b""
            newline = b"\n" if before and not before.endswith(b"\n") else b""
            write_atomic(path, before + newline + line.encode())
    except OSError as error:
        raise InputError(
            f"{path}: cannot write: {error.strerror or error}; repair the folder, then start again"
        ) from error


def read(folder: Path) -> tuple[list[RunResult], list[str]]:
    """(results in file order, a remark for each unreadable line). A missing file holds no results.

    Raises InputError if the file has complete lines and none of them is a result of fastvid.
    """
    path = folder / FILE
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    parsed = {number: _parse(line) for number, line in enumerate(lines, start=1) if line.strip()}
    found = [result for result in parsed.values() if result]
    if not found and any(line.strip() for line in lines[:-1]):  # the last line may be torn
        raise InputError(f"{path} holds no result that this version of fastvid can read: give another folder")
    remarks = [
        f"{path}, line {number}: not a complete result, skipped; its run will be trained again"
        for number, result in parsed.items()
        if not result
    ]
    return found, remarks


def _parse(line: bytes) -> RunResult | None:
    """None unless `line` is a result whose checksum matches: then all values have their types."""
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or entry.pop(_CHECKSUM, None) != _sha256(entry):
            return None
        return _known(RunResult, entry | {"history": [_known(Evaluation, e) for e in entry["history"]]})
    except (ValueError, RecursionError):  # not JSON, or JSON that no result holds (NaN, endless nesting)
        return None
    except (KeyError, TypeError):  # another program's line with a checksum of its own
        return None


def _known(kind: type, entry: dict):
    return kind(**{name: entry[name] for name in kind.__dataclass_fields__ if name in entry})


def _sha256(entry: dict) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True, allow_nan=False).encode()).hexdigest()
