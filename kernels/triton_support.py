"""Triton where it is installed, and what every kernel launch of this package shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: the references run, checks.choose explains the rest
    triton = tl = None

# TRITON_INTERPRET=1, set before the first import, makes the kernels run on CPU tensors, slowly: for tests.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
# Options of every launch. Triton 3.10 changes this default, and the bits of a result must not change.
OPTIONS = {"enable_fp_fusion": True}


def jit(function: Callable) -> Callable:
    """triton.jit that specialises on pointers and constants only, so one binary serves every batch size."""
    if triton is None:
        return function
    parameters = inspect.signature(function).parameters
    scalars = [name for name in parameters if name.islower() and not name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize=scalars)


def launch(kernel, grid: tuple[int, ...], first: Tensor, *arguments, **constants) -> None:
    """Launch a kernel on the device of its first argument."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, **constants, **OPTIONS)


def dense(parameter: Tensor | None) -> Tensor | None:
    """A contiguous parameter, as the kernels read it: a copy of a few kilobytes at most."""
    return None if parameter is None else parameter.contiguous()
