"""How a file that must not be lost is written: beside its place, synced, renamed. A crash or a full disk leaves the old one."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from fastvid.errors import InputError


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while they wrote left behind."""
    for path in folder.glob(".*.partial"):
        process = path.name.split(".")[-2]
        if process.isdigit() and not is_alive(int(process)):
            with contextlib.suppress(OSError):
                path.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, whole or not at all. Raises InputError with path and size when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
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
        with contextlib.suppress(OSError):  # gone after the rename, and never there in a folder that is none
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """The rename itself must survive a power cut. Some file systems cannot sync a folder, and keep order without."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def is_alive(process: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True
