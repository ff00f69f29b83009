"""Attention transfer: the distance of two normalised maps of where a network looks, fused.

    loss = factor/(B·P) · Σ (Q(student) - Q(teacher))²,   Q(x) = A / ‖A‖₂ over the P = H·W positions,   A = mean over channels of x²
    ∂loss/∂student = factor·4/(B·P·C·‖A‖) · (D - Q·⟨D, Q⟩) · student,   D = Q(student) - Q(teacher)

One program per image. Where the student's map of one image fits into the registers of a program (channels times positions, each
rounded up to a power of two, at most 32,768: 32 channels at 32 x 32), it is read once and its gradient written in the same pass:
(2·Cs + Ct)·B·P·itemsize bytes in all, (Cs + Ct) without a gradient. A larger map is walked through in tiles: norms, distance,
gradient, in which the student's map is read four times and the teacher's three, (5·Cs + 3·Ct) in all, mostly from the L2.
A gradient of the teacher's map, and any in fp16, is a pass of its own over both maps.
"""

from __future__ import annotations

import torch
from fastvid.kernels import checks, reference
from fastvid.kernels.launch import (
    OPTIONS,
    first_derivative_only,
    jit,
    one_pass,
    power_of_two,
    save,
    saved,
    scale,
    tl,
)
from torch import Tensor

_IN_REGISTERS = 32768  # elements of a student map: 64 a thread at 16 warps
_TILE = 16384  # elements of any other tile
_POSITIONS = 1024  # of one tile of a larger map


@jit
def _tile(map_ptr, offs_p, positions, first, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets, mask and fp32 values of BLOCK channels from `first` on at some positions of one image."""
    offs_c = first + tl.arange(0, BLOCK)
    offs = offs_p[:, None] * CHANNELS + offs_c[None, :]
    mask = (offs_p < positions)[:, None] & (offs_c < CHANNELS)[None, :]
    return offs, mask, tl.load(map_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@jit
def _attention(map_ptr, offs_p, positions, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean over channels of the squares at some positions of one image."""
    sums = tl.zeros(offs_p.shape, tl.float32)
    for first in range(0, CHANNELS, BLOCK):
        _, _, values = _tile(map_ptr, offs_p, positions, first, CHANNELS, BLOCK)
        sums += tl.sum(values * values, axis=1)
    return sums / CHANNELS


@jit
def _norm(squares):
    """Square root, at least 1e-12, the eps of torch.nn.functional.normalize; NaN stays NaN."""
    norm = tl.sqrt_rn(squares)
    return tl.where(norm < 1e-12, 1e-12, norm)


@jit
def _attention_kernel(
    student_ptr,  # [B, P, Cs]: a channels-last map seen as rows of channels
    teacher_ptr,  # [B, P, Ct]
    upstream_ptr,  # scalar fp32, or None: 1
    loss_ptr,  # [B] fp32, each image's share of the loss; or None
    gradient_ptr,  # [B, P, Cs], every element written exactly once; or None
    positions,
    inverse_count,
    STUDENT_CHANNELS: tl.constexpr,
    TEACHER_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    STUDENT_BLOCK: tl.constexpr,
    TEACHER_BLOCK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """One program does one image. Squares are taken in fp32: in fp16 they overflow from 256."""
    image = tl.program_id(0).to(tl.int64)
    student_ptr += image * positions * STUDENT_CHANNELS
    teacher_ptr += image * positions * TEACHER_CHANNELS
    if gradient_ptr is not None:
        gradient_ptr += image * positions * STUDENT_CHANNELS
    slope = 4.0 / STUDENT_CHANNELS * inverse_count
    if upstream_ptr is not None:
        slope *= tl.load(upstream_ptr)
    if IN_REGISTERS:
        offs_p = tl.arange(0, BLOCK_POSITIONS)
        offs, mask, values = _tile(student_ptr, offs_p, positions, 0, STUDENT_CHANNELS, STUDENT_BLOCK)
        student = tl.sum(values * values, axis=1) / STUDENT_CHANNELS
        teacher = _attention(teacher_ptr, offs_p, positions, TEACHER_CHANNELS, TEACHER_BLOCK)
        student_norm, teacher_norm = _norm(tl.sum(student * student)), _norm(tl.sum(teacher * teacher))
        student /= student_norm
        difference = student - teacher / teacher_norm
        distance, along = tl.sum(difference * difference), tl.sum(difference * student)
        if gradient_ptr is not None:
            # A norm held at its least value does not move with the map.
            along = tl.where(student_norm > 1e-12, along, along * 0.0)
            coefficient = slope * ((difference - student * along) / student_norm)
            tl.store(gradient_ptr + offs, coefficient[:, None] * values, mask=mask)
    else:
        offs_p = tl.arange(0, BLOCK_POSITIONS)
        student_squares = tl.zeros([BLOCK_POSITIONS], tl.float32)
        teacher_squares = tl.zeros([BLOCK_POSITIONS], tl.float32)
        for first in range(0, positions, BLOCK_POSITIONS):
            left, start = positions - first, tl.cast(first, tl.int64)
            student = _attention(
                student_ptr + start * STUDENT_CHANNELS, offs_p, left, STUDENT_CHANNELS, STUDENT_BLOCK
            )
            teacher = _attention(
                teacher_ptr + start * TEACHER_CHANNELS, offs_p, left, TEACHER_CHANNELS, TEACHER_BLOCK
            )
            student_squares += student * student
            teacher_squares += teacher * teacher
        student_norm, teacher_norm = _norm(tl.sum(student_squares)), _norm(tl.sum(teacher_squares))
        distances = tl.zeros([BLOCK_POSITIONS], tl.float32)
        products = tl.zeros([BLOCK_POSITIONS], tl.float32)
        for first in range(0, positions, BLOCK_POSITIONS):
            left, start = positions - first, tl.cast(first, tl.int64)
            student = (
                _attention(
                    student_ptr + start * STUDENT_CHANNELS, offs_p, left, STUDENT_CHANNELS, STUDENT_BLOCK
                )
                / student_norm
            )
            teacher = (
                _attention(
                    teacher_ptr + start * TEACHER_CHANNELS, offs_p, left, TEACHER_CHANNELS, TEACHER_BLOCK
                )
                / teacher_norm
            )
            difference = student - teacher
            distances += difference * difference
            products += difference * student
        distance, along = tl.sum(distances), tl.sum(products)
        if gradient_ptr is not None:
            along = tl.where(student_norm > 1e-12, along, along * 0.0)
            for first in range(0, positions, BLOCK_POSITIONS):
                left, start = positions - first, tl.cast(first, tl.int64)
                student = (
                    _attention(
                        student_ptr + start * STUDENT_CHANNELS, offs_p, left, STUDENT_CHANNELS, STUDENT_BLOCK
                    )
                    / student_norm
                )
                teacher = (
                    _attention(
                        teacher_ptr + start * TEACHER_CHANNELS, offs_p, left, TEACHER_CHANNELS, TEACHER_BLOCK
                    )
                    / teacher_norm
                )
                difference = student - teacher
                coefficient = slope * ((difference - student * along) / student_norm)
                for channel in range(0, STUDENT_CHANNELS, STUDENT_BLOCK):
                    offs, mask, values = _tile(
                        student_ptr + start * STUDENT_CHANNELS,
                        offs_p,
                        left,
                        channel,
                        STUDENT_CHANNELS,
                        STUDENT_BLOCK,
                    )
                    tl.store(
                        gradient_ptr + start * STUDENT_CHANNELS + offs,
                        coefficient[:, None] * values,
                        mask=mask,
                    )
    if loss_ptr is not None:
        tl.store(loss_ptr + image, distance * inverse_count)


def _constants(student_channels: int, teacher_channels: int, positions: int) -> dict:
    """How one image is cut into tiles."""
    block_positions = power_of_two(positions)
    student_block = power_of_two(student_channels)
    in_registers = block_positions * student_block <= _IN_REGISTERS
    if not in_registers:
        block_positions = min(block_positions, _POSITIONS)
        student_block = min(student_block, _TILE // block_positions)
    # A program has a multiprocessor to itself: 128 images on 132 of them. 32 values a thread keep its loads in flight.
    tile = max(block_positions * student_block, _TILE // 4)
    return {
        "BLOCK_POSITIONS": block_positions,
        "STUDENT_BLOCK": student_block,
        "IN_REGISTERS": in_registers,
        "TEACHER_BLOCK": max(1, min(power_of_two(teacher_channels), _TILE // block_positions)),
        "num_warps": 16 if tile > 8192 else 8 if tile > 4096 else 4,
    }


def _launch(student, teacher, upstream, factor, *, with_loss, with_gradient):
    """Each image's share of the loss [B], and the gradient of the student's map; None for what was not asked."""
    images, channels, positions = *student.shape[:2], student.shape[2] * student.shape[3]
    loss = torch.empty(images, dtype=torch.float32, device=student.device) if with_loss else None
    gradient = torch.empty_like(student) if with_gradient else None
    if student.numel():
        with torch.cuda.device_of(student):
            _attention_kernel[(images,)](
                student,
                teacher,
                upstream,
                loss,
                gradient,
                positions,
                factor / (images * positions),
                STUDENT_CHANNELS=channels,
                TEACHER_CHANNELS=teacher.shape[1],
                **_constants(channels, teacher.shape[1], positions),
                **OPTIONS,
            )
    return loss, gradient


@torch.library.custom_op("fastvid::attention_transfer", mutates_args=())
def _attention_transfer(
    student: Tensor, teacher: Tensor, factor: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss, gradient = _launch(student, teacher, None, factor, with_loss=True, with_gradient=with_gradient)
    total = loss.sum() if student.numel() else loss.new_full((), float("nan"))  # the mean of nothing
    return total, student.new_empty(0) if gradient is None else gradient, loss.new_empty(0)


@_attention_transfer.register_fake
def _(student, teacher, factor, with_gradient):
    gradient = torch.empty_like(student) if with_gradient else student.new_empty(0)
    return student.new_empty((), dtype=torch.float32), gradient, student.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("fastvid::attention_transfer_gradient", mutates_args=())
def _attention_transfer_gradient(upstream: Tensor, student: Tensor, teacher: Tensor, factor: float) -> Tensor:
    """Gradient of `student`. The loss is symmetric: that of `teacher` is this one with the maps in each other's place."""
    return _launch(student, teacher, upstream, factor, with_loss=False, with_gradient=True)[1]


@_attention_transfer_gradient.register_fake
def _(upstream, student, teacher, factor):
    return torch.empty_like(student)


def _backward(ctx, upstream, *_):
    (student, teacher, factor, _), nothing = saved(ctx)
    first_derivative_only("attention_transfer", upstream)
    student_gradient, teacher_gradient = scale(ctx, upstream, nothing)[0], None
    if student_gradient is None and ctx.needs_input_grad[0]:
        student_gradient = _attention_transfer_gradient(upstream, student, teacher, factor)
    if ctx.needs_input_grad[1]:
        teacher_gradient = _attention_transfer_gradient(upstream, teacher, student, factor)
    return student_gradient, teacher_gradient, None, None


_attention_transfer.register_autograd(_backward, setup_context=save)


def attention_transfer(
    student: Tensor, teacher: Tensor, *, factor: float = 1.0, impl: str = "auto"
) -> Tensor:
    """Mean squared difference of two attention maps, over images and positions.

    student: [B, Cs, H, W], teacher: [B, Ct, H, W], any floating dtype; the channel counts may differ.
    factor: multiplies the loss; on a GPU better here than outside, because backward then need not touch the map again.
    Returns a scalar, fp32 (fp64 for fp64 input).  impl: auto (Triton for CUDA tensors, else the reference), triton or reference.
    Triton wants channels-last maps of fp32, bf16 or fp16 and has first derivatives only.
    Raises ValueError on shapes, dtypes or layouts that do not fit.  Source: Zagoruyko and Komodakis, ICLR 2017.
    """
    checks.maps("attention_transfer", student=student, teacher=teacher)
    checks.numbers("attention_transfer", factor=factor)
    if checks.choose("attention_transfer", impl, student=student, teacher=teacher) == "triton":
        checks.channels_last("attention_transfer", student=student, teacher=teacher)
        return _attention_transfer(student, teacher, factor, one_pass(student))[0]
    return factor * reference.attention_transfer(*checks.upcast(student, teacher))
