"""Write files that must not be lost, and lock files: one process at a time.

A file is written beside its place, synced and renamed, so a crash or a full disk leaves the old file. The
temporary name is fixed: the next process overwrites what a killed process left. Processes that may write the
same file hold a lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fastvid.errors import InputError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, completely or not at all. Raises InputError if that fails."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write {len(content):,} bytes: {error.strerror or error}; "
            "make room there or choose another folder, then start again"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # absent after the rename, or when `path.parent` is not a folder
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut. A file system that cannot sync folders keeps the order."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, which stays; the kernel releases the lock of a killed process.

    Raises BlockingIOError if another process holds the lock and `wait` is False, and InputError if the file
    system has no locks.
    """
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise InputError(
                f"{path.parent} is on a file system without file locks ({error.strerror}): "
                "choose a folder on a local disk, or mount this one with locks"
            ) from error
        yield
    finally:
        os.close(opened)
