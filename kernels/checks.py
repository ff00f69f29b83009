"""What every loss checks about its arguments, and how it chooses an implementation."""

from collections.abc import Sequence

import torch
from fastvid.kernels.triton_support import INTERPRETED, triton
from torch import Tensor
from torch.autograd import forward_ad

IMPLEMENTATIONS = ("auto", "triton", "reference")
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def implementation(op: str, impl: str) -> None:
    """Raise ValueError unless `impl` is one of IMPLEMENTATIONS."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op} has no implementation {impl!r}: choose from {', '.join(IMPLEMENTATIONS)}")


def choose(op: str, impl: str, inputs: dict[str, Tensor], **parameters: Tensor | None) -> str:
    """Return "triton" or "reference"; "auto" is triton for CUDA tensors and the reference for CPU tensors.
    Raises ValueError if Triton is chosen but cannot take the tensors. inputs: maps or logits by name."""
    implementation(op, impl)
    given = inputs | {name: tensor for name, tensor in parameters.items() if tensor is not None}
    if impl == "reference" or (impl == "auto" and not any(tensor.is_cuda for tensor in given.values())):
        return "reference"
    if triton is None:
        raise ValueError(f"{op} needs Triton here: pip install triton, or pass impl='reference'")
    first, device = next((name, tensor.device) for name, tensor in given.items())
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        remedy = "move the tensors, or pass impl='auto' or 'reference'"
        raise ValueError(
            f"{op} has Triton kernels for CUDA tensors only, but `{first}` is on {device}: {remedy}"
        )
    for name, tensor in given.items():
        if tensor.device != device:
            where = f"`{first}` is on {device} and `{name}` on {tensor.device}"
            raise ValueError(f"{op} wants all tensors on one device, but {where}")
        if tensor.dtype not in _TRITON_DTYPES:
            found = f"`{name}` is {_describe(tensor)}: use {name}.float(), or pass impl='reference'"
            raise ValueError(f"{op} has Triton kernels for float32, bfloat16 and float16, but {found}")
        # Without this check, a forward-mode tangent would be lost without any message.
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{op} has no forward-mode derivative in Triton: pass impl='reference'")
    for name, tensor in inputs.items():
        _rows_of_channels(op, name, tensor)
    return "triton"


def _rows_of_channels(op: str, name: str, tensor: Tensor) -> None:
    """The kernels read channels-last maps as rows of channels, and logits as rows, without copying them."""
    if tensor.dim() == 4 and tensor.numel() and not tensor.is_contiguous(memory_format=torch.channels_last):
        wanted, remedy = "channels-last maps", "to(memory_format=torch.channels_last)"
    elif tensor.dim() == 2 and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        wanted, remedy = "the classes of a row side by side", "contiguous()"
    else:
        return
    raise ValueError(
        f"{op} needs {wanted}, but `{name}` has shape {tuple(tensor.shape)} and strides {tensor.stride()}.\n"
        f"Use {name}.{remedy} where it is produced."
    )


def upcast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Half-precision tensors as fp32, others unchanged: residuals are squared, and 256² overflows in fp16."""
    return [t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def maps(op: str, **tensors: Tensor) -> None:
    """Feature maps must be floating point [B, C, H, W] with at least one channel, and agree in B, H and W."""
    (first, reference), *_ = tensors.items()
    for name, tensor in tensors.items():
        floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if not floating or tensor.dim() != 4 or not tensor.shape[1]:
            raise ValueError(
                f"{op} wants floating-point maps [B, C, H, W], but `{name}` is {_describe(tensor)}"
            )
        if (tensor.shape[0], *tensor.shape[2:]) != (reference.shape[0], *reference.shape[2:]):
            found = f"`{name}` is {_describe(tensor)}, but `{first}` is {_describe(reference)}"
            raise ValueError(f"{op}: {found}: they must agree in B, H and W")


def logits(op: str, **tensors: Tensor) -> None:
    """Logits must be floating point, of two equal shapes [B, classes], with at least one class."""
    (first, student), (second, teacher) = tensors.items()
    floating = student.is_floating_point() and teacher.is_floating_point()
    if student.dim() != 2 or student.shape != teacher.shape or not student.shape[1] or not floating:
        found = f"`{first}` is {_describe(student)} and `{second}` is {_describe(teacher)}"
        raise ValueError(f"{op} wants floating-point logits of two equal shapes [B, classes], but {found}")


def shape(op: str, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    """`tensor` must have exactly the wanted shape."""
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != wanted:
        raise ValueError(f"{op} wants `{name}` of shape {wanted}, but it is {_describe(tensor)}")


def numbers(op: str, **values: float) -> None:
    """Constants must be numbers: a tensor would get no gradient, and reading it would synchronise."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            remedy = "take its .item(), or multiply the loss by it outside"
            raise ValueError(f"{op} wants a number as `{name}`, but it is a tensor: {remedy}")


def pairs(op: str, *, count: int | None = None, **lists: Sequence) -> None:
    """Two lists must have one entry per tap: `count` entries, or equally many and at least one."""
    for name, values in lists.items():
        if isinstance(values, Tensor) or not isinstance(values, Sequence):
            kind = _describe(values) if isinstance(values, Tensor) else f"a {type(values).__name__}"
            remedy = "put it into brackets"
            raise ValueError(f"{op} wants a list with one entry per tap, but `{name}` is {kind}: {remedy}")
    (student, students), (teacher, teachers) = lists.items()
    if len(students) != len(teachers) or len(students) != (count or len(students)) or not len(students):
        wanted = f"{count} entries, one per tap," if count else "one entry per tap"
        found = f"`{student}` has {len(students)} and `{teacher}` has {len(teachers)}"
        raise ValueError(f"{op} wants {wanted} in both lists, but {found}")


def tap(op: str, impl: str, **given: tuple[Tensor, int]) -> None:
    """Check the two maps of a tap and their numbers of channels, by the names that the caller knows."""
    tensors = {name: tensor for name, (tensor, _) in given.items()}
    maps(op, **tensors)
    for name, (tensor, wanted) in given.items():
        if tensor.shape[1] != wanted:
            raise ValueError(f"{op} was made for {wanted} channels in `{name}`, but got {_describe(tensor)}")
    choose(op, impl, tensors)


def _describe(tensor: object) -> str:
    """The dtype and shape of a tensor, or whatever was given in its place."""
    if not isinstance(tensor, Tensor):
        return repr(tensor)
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
