"""The rules that every loss checks at its border, and the one rule that chooses an implementation."""

from collections.abc import Sequence

import torch
from fastvid.kernels.launch import INTERPRETED, batched, triton
from torch import Tensor
from torch.autograd import forward_ad

IMPLEMENTATIONS = ("auto", "triton", "reference")
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(op: str, impl: str, **tensors: Tensor | None) -> str:
    """The implementation that runs for `impl`: auto takes triton for CUDA tensors and the reference for CPU tensors.

    Raises ValueError where there is no such implementation, or where Triton cannot take these tensors.
    """
    implementation(op, impl)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if impl == "reference" or (impl == "auto" and not any(tensor.is_cuda for tensor in given.values())):
        return "reference"
    if triton is None:
        raise ValueError(
            f"{op} runs in Triton here, which is not installed: pip install triton, or pass impl='reference'"
        )
    (first, device), *others = ((name, tensor.device) for name, tensor in given.items())
    for name, other in others:
        if other != device:
            raise ValueError(
                f"{op} wants all tensors on one device, but `{first}` is on {device} and `{name}` on {other}"
            )
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise ValueError(
            f"{op} has Triton kernels for CUDA tensors only, but `{first}` is on {device}: move the tensors, "
            "or pass impl='auto' or 'reference'"
        )
    for name, tensor in given.items():
        if tensor.dtype not in _TRITON_DTYPES:
            raise ValueError(
                f"{op} has Triton kernels for float32, bfloat16 and float16, but `{name}` is {describe(tensor)}: "
                f"use {name}.float(), or pass impl='reference'"
            )
    if not torch.compiler.is_compiling() and any(map(transformed, given.values())):
        raise ValueError(
            f"{op} has no torch.func transform in Triton and no forward-mode derivative: pass impl='reference' under "
            "grad, vmap, jvp and their like"
        )
    return "triton"


def transformed(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a torch.func transform or carries a forward-mode tangent."""
    return batched(tensor) or forward_ad.unpack_dual(tensor).tangent is not None


def upcast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Half-precision tensors as fp32, the others as they are: a residual is squared, and fp16 overflows from 256."""
    return [t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def maps(op: str, **tensors: Tensor) -> None:
    """Feature maps are four-dimensional and floating point, have channels, and agree in B, H and W."""
    for name, tensor in tensors.items():
        if (
            not isinstance(tensor, Tensor)
            or tensor.dim() != 4
            or not tensor.is_floating_point()
            or not tensor.shape[1]
        ):
            raise ValueError(
                f"{op} wants floating-point maps [B, C, H, W], but `{name}` is {describe(tensor)}"
            )
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if (tensor.shape[0], *tensor.shape[2:]) != (reference.shape[0], *reference.shape[2:]):
            raise ValueError(
                f"{op}: `{name}` is {describe(tensor)}, but `{first}` is {describe(reference)}: "
                "they must agree in B, H and W"
            )


def channels_last(op: str, **tensors: Tensor) -> None:
    """The kernels see a channels-last map as rows of channels, and copy nothing behind the caller's back."""
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{op} needs channels-last maps, but `{name}` has shape {tuple(tensor.shape)} and strides {tensor.stride()}.\n"
                f"Use {name}.to(memory_format=torch.channels_last) where it is produced."
            )


def logits(op: str, **tensors: Tensor) -> None:
    """Two equal shapes [B, classes], floating point, with at least one class."""
    (first, student), (second, teacher) = tensors.items()
    if (
        student.dim() != 2
        or student.shape != teacher.shape
        or not student.shape[1]
        or not (student.is_floating_point() and teacher.is_floating_point())
    ):
        raise ValueError(
            f"{op} wants floating-point logits of two equal shapes [B, classes], but `{first}` is "
            f"{describe(student)} and `{second}` is {describe(teacher)}"
        )


def rows(op: str, most: int, **tensors: Tensor) -> None:
    """Rows whose elements lie side by side, and of at most `most` of them."""
    for name, tensor in tensors.items():
        if tensor.shape[1] > most:
            raise ValueError(
                f"{op} has Triton kernels for up to {most} classes, but `{name}` is {describe(tensor)}: pass impl='reference'"
            )
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(
                f"{op} needs the classes of a row side by side, but `{name}` has shape {tuple(tensor.shape)} "
                f"and strides {tensor.stride()}.\nUse {name}.contiguous() where it is produced."
            )


def shape(op: str, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    """`tensor` has exactly the wanted shape."""
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != wanted:
        raise ValueError(f"{op} wants `{name}` of shape {wanted}, but it is {describe(tensor)}")


def numbers(op: str, **values: float) -> None:
    """A kernel takes its constants from the host: a tensor would lose its gradient, and cost a synchronisation."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            raise ValueError(
                f"{op} wants a number as `{name}`, but it is a tensor: take its .item(), or multiply the loss by it outside"
            )


def implementation(op: str, impl: str) -> None:
    """One of IMPLEMENTATIONS."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op} has no implementation {impl!r}: choose from {', '.join(IMPLEMENTATIONS)}")


def pairs(op: str, *, count: int | None = None, **lists: Sequence) -> None:
    """Two lists of one entry per tap: as many as `count`, or equally many and at least one."""
    for name, values in lists.items():
        if isinstance(values, Tensor) or not isinstance(values, Sequence):
            kind = describe(values) if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ValueError(
                f"{op} wants a list with one entry per tap, but `{name}` is {kind}: put it into brackets"
            )
    (student, students), (teacher, teachers) = lists.items()
    if len(students) != len(teachers) or len(students) != (count or len(students)) or not len(students):
        wanted = f"{count} entries, one per tap," if count else "one entry per tap"
        raise ValueError(
            f"{op} wants {wanted} in both lists, but `{student}` has {len(students)} and `{teacher}` has {len(teachers)}"
        )


def tap(op: str, impl: str, **given: tuple[Tensor, int]) -> None:
    """The two maps of a tap and how many channels each shall have, at the border of a loss module, in the names that its caller knows."""
    tensors = {name: tensor for name, (tensor, _) in given.items()}
    maps(op, **tensors)
    for name, (tensor, wanted) in given.items():
        if tensor.shape[1] != wanted:
            raise ValueError(f"{op} was made for {wanted} channels in `{name}`, but it is {describe(tensor)}")
    if choose(op, impl, **tensors) == "triton":
        channels_last(op, **tensors)


def describe(tensor: Tensor) -> str:
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        if isinstance(tensor, Tensor)
        else repr(tensor)
    )
