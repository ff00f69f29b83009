"""The device that a run is on: its choice, its compute types, its memory, its threads."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path

import torch

from fastvid.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of --device. Raises InputError for one that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise InputError(f"fastvid does not run on {name!r}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"no GPU for --device {name}: torch {torch.__version__} sees {torch.cuda.device_count()}; "
            "take --device cpu, or see `fastvid doctor`"
        )
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Autocast to a key of DTYPES. Nothing is cached: a step uses each weight once, and a cache must not outlive a captured graph."""
    return torch.autocast(
        device.type, dtype=DTYPES[precision], enabled=precision != "fp32", cache_enabled=False
    )


@cache
def tune(device: torch.device, processes: int = 1) -> None:
    """Set up this process for training on `device`, as one of `processes` on this machine.

    On a GPU cuDNN tries its algorithms, each shape once. On a CPU:
    Threads: alone, as torch and OMP_NUM_THREADS have it; else its part of the cores, for torchrun writes OMP_NUM_THREADS=1 unasked.
    The pool for operators side by side (interop) stays as it is: an eager step never uses it.
    Memory: glibc shall keep what is freed. It would give large maps back to the system and take them anew, page by page, in every step.
    """
    if device.type == "cuda":
        if device.index is not None:  # else the current GPU, which is a rank's own
            torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        return
    if processes > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))
    mallopt = (
        getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    )  # musl has none
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # the most that an older glibc takes


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of tensors on a GPU since reset_peak_memory, warm-up included; of the whole process on a CPU. None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not getrusage, whose peak may be that of the process that started this one
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
    except (OSError, KeyError):
        return None


def reset_peak_memory(device: torch.device) -> None:
    """From now on peak_memory tells the peak since now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # only Linux has it, and not every container
        Path("/proc/self/clear_refs").write_text("5")


def synchronize(device: torch.device) -> None:
    """Wait until all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
