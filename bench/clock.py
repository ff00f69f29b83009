"""Two clocks: the GPU's events, and the host's."""

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
    """p50, p20, p80, to four digits."""
    return [float(f"{value:.4g}") for value in np.quantile(values, (0.5, 0.2, 0.8))]


def gpu_microseconds(call: Callable, quick: bool) -> list[float]:
    """p50, p20, p80 by events, each time with the L2 overwritten before."""
    times = triton.testing.do_bench(
        call, warmup=10, rep=10 if quick else 40, quantiles=(0.5, 0.2, 0.8)
    )  # milliseconds
    return [1e3 * value for value in times]


def wall_microseconds(call: Callable, rounds: int) -> list[float]:
    """p50, p20, p80 by the host's clock."""
    times = []
    for _ in range(1 + rounds):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        times.append(1e6 * (time.perf_counter() - started))
    return quantiles(times[1:])  # the first one warms up
