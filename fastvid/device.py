"""The device of a run: choice, compute types, memory and threads."""

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
    """The device that --device `name` means. Under torchrun or Slurm, each local process takes its own GPU.

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
            f"no GPU for --device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; "
            "take --device cpu, or see `fastvid doctor`"
        )
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Autocast to the type DTYPES[precision].

    The cache of cast weights is off: a step uses each weight once, and a captured graph needs its own casts.
    """
    enabled = precision != "fp32"
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=enabled, cache_enabled=False)


@cache
def tune(device: torch.device) -> None:
    """Set up this process for training on `device`.

    On a GPU, cuDNN measures its algorithms once for each shape. On a CPU:
    Threads: a single process keeps torch's setting. Several processes share the cores, because torchrun sets
    OMP_NUM_THREADS=1 by default.
    Memory: glibc keeps freed memory. By default glibc returns large maps to the system and has to request
    them again, page by page, in every step.
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
    # musl has no mallopt
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # values of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # 2**25: limit of an older glibc


def peak_memory(device: torch.device) -> int | None:
    """Largest number of bytes in GPU tensors since reset_peak_memory, warm-up included. None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak_memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
