"""The rules that every loss checks at its border, and the one rule that chooses an implementation."""
from collections.abc import Sequence

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "reference")


def choose(op: str, impl: str) -> str:
    """The implementation that runs for `impl`. Raises ValueError for one that does not exist."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op} has no implementation {impl!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    return "reference"


def upcast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Half-precision tensors as fp32, the others as they are: a residual is squared, and fp16 overflows from 256."""
    return [t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def maps(op: str, **tensors: Tensor) -> None:
    """Feature maps are four-dimensional and floating point, and agree in B, H and W."""
    for name, tensor in tensors.items():
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise ValueError(f"{op} wants floating-point maps [B, C, H, W], but `{name}` is {describe(tensor)}")
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if (tensor.shape[0], *tensor.shape[2:]) != (reference.shape[0], *reference.shape[2:]):
            raise ValueError(f"{op}: `{name}` is {describe(tensor)}, but `{first}` is {describe(reference)}: "
                             "they must agree in B, H and W")


def shape(op: str, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    """`tensor` has exactly the wanted shape."""
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{op} wants `{name}` of shape {wanted}, but it is {describe(tensor)}")


def pairs(op: str, **lists: Sequence) -> None:
    """Two lists of one entry per tap, equally long and not empty."""
    (student, students), (teacher, teachers) = lists.items()
    if len(students) != len(teachers) or not students:
        raise ValueError(f"{op} wants one entry per tap in both lists, but `{student}` has {len(students)} "
                         f"and `{teacher}` has {len(teachers)}")


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
