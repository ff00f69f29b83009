"""Arrays that took long to make, kept beside the data in one safetensors file and verified before they are used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from fastvid.errors import InputError
from fastvid.files import write_atomic
from fastvid.progress import say

METADATA_KEY = "fastvid"


def read(path: Path, key: str) -> tuple[dict[str, np.ndarray], dict] | None:
    """(arrays, facts) that `write` kept under this key, or None where they are missing, of another key or, with a note, damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})[METADATA_KEY])
            if header["key"] != key:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        damaged = header["sha256"] != _checksum(arrays, header["facts"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        damaged = True
    if damaged:
        say(f"{path}: this cache is damaged; it is made again from the files beside it")
        return None
    return arrays, header["facts"]


@contextmanager
def making(path: Path) -> Iterator[bool]:
    """Hold the place of this file, so that of several first starts one makes it; tells whether another process had it until now.

    Where the folder cannot be written, nothing is held.
    """
    lock, waited = FileLock(path.with_name(f".{path.name}.lock")), False
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            lock.acquire()
            waited = True
    try:
        yield waited
    finally:
        lock.release()


def write(path: Path, key: str, arrays: dict[str, np.ndarray], facts: dict) -> None:
    """Keep them. A folder that cannot be written is no error: the next start makes them again, and a note says why."""
    header = json.dumps({"key": key, "facts": facts, "sha256": _checksum(arrays, facts)}, sort_keys=True)
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, safetensors_bytes(arrays, {METADATA_KEY: header}))
    except (InputError, OSError):
        say(f"{path} cannot be written: this data set is read anew at each start")


def _checksum(arrays: dict[str, np.ndarray], facts: dict) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.data)
    return digest.hexdigest()
