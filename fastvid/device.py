"""The device that a run is on: its choice, its compute types, its memory, its threads."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager
from functools import cache

import torch

from fastvid.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device that --device `name` means: of several processes of torchrun or Slurm each takes a GPU of its own.

    Raises InputError for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", ""))
    if name == "cuda" and local_rank.isdigit() and torch.cuda.device_count():
        name = f"cuda:{int(local_rank) % torch.cuda.device_count()}"
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
def tune(device: torch.device) -> None:
    """Set up this process for training on `device`.

    On a GPU cuDNN tries its algorithms, each shape once. On a CPU:
    Threads: a single process keeps torch's setting; several share the cores, because torchrun sets OMP_NUM_THREADS=1 by default.
    Memory: glibc keeps what is freed. It would return large maps to the system and take them again, page by page, in every step.
    """
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
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
    """Bytes of tensors on a GPU at most since reset_peak_memory, warm-up included. None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Let peak_memory count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Wait until all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
