"""Two clocks: events on the GPU, and the clock of the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from fastvid.kernels.triton_support import triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def quantiles(values: list[float]) -> list[float]:
    """p50, p20 and p80, rounded to four digits."""
    return [float(f"{value:.4g}") for value in np.quantile(values, (0.5, 0.2, 0.8))]


def gpu_microseconds(call: Callable, quick: bool) -> list[float]:
    """p50, p20 and p80 by GPU events. The L2 cache is overwritten before each call."""
    repetitions = 10 if quick else 40
    milliseconds = triton.testing.do_bench(call, warmup=10, rep=repetitions, quantiles=(0.5, 0.2, 0.8))
    return [1e3 * value for value in milliseconds]


def wall_microseconds(call: Callable, rounds: int) -> list[float]:
    """p50, p20 and p80 by the clock of the host."""
    times = []
    for _ in range(1 + rounds):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        times.append(1e6 * (time.perf_counter() - started))
    return quantiles(times[1:])  # the first call is the warm-up
