"""Attention transfer: the distance of two normalised maps of where a network looks, fused. P = H·W positions.

    loss = factor/(B·P) · Σ (Q(student) - Q(teacher))²,  Q(x) = A / ‖A‖₂ over P,  A = mean over channels of x²
    ∂loss/∂student = factor·4/(B·P·C·‖A‖) · (D - Q·⟨D, Q⟩) · student,   D = Q(student) - Q(teacher)

One program does one image. If its student map fits into registers (channels times positions, each rounded up
to a power of two, at most 32,768: 32 channels at 32 x 32), `_attention_kernel` reads the map once and writes
its gradient: (2·Cs + Ct)·B·P·itemsize bytes, or (Cs + Ct) without a gradient. `_tiled_attention_kernel` walks
through a larger map three times, for norms, distance and gradient: (5·Cs + 3·Ct), mostly from the L2 cache.
A gradient of the teacher's map, and any gradient in fp16, is one more pass over both maps.
"""

from __future__ import annotations

from fastvid.kernels import checks, reference
from fastvid.kernels.one_pass import begin_backward, one_pass, operator
from fastvid.kernels.triton_support import jit, launch, tl, triton
from torch import Tensor

_IN_REGISTERS = 32768  # elements of a student map: 64 in each thread of 16 warps
_TILE = 16384  # elements of any other tile
_POSITIONS = 1024  # positions in a tile of a larger map


@jit
def _tile(map_ptr, first, offs_p, positions, channel, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets, mask and values at positions first + offs_p and BLOCK channels. Offsets count from `first`."""
    offs_c = channel + tl.arange(0, BLOCK)
    offs = offs_p[:, None] * CHANNELS + offs_c[None, :]
    mask = (offs_p < positions - first)[:, None] & (offs_c < CHANNELS)[None, :]
    map_ptr += tl.cast(first, tl.int64) * CHANNELS
    return offs, mask, tl.load(map_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@jit
def _attention(map_ptr, first, offs_p, positions, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """The mean over channels of the squares, at the positions first + offs_p of one image."""
    sums = tl.zeros(offs_p.shape, tl.float32)
    for channel in range(0, CHANNELS, BLOCK):
        _, _, values = _tile(map_ptr, first, offs_p, positions, channel, CHANNELS, BLOCK)
        sums += tl.sum(values * values, axis=1)
    return sums / CHANNELS


@jit
def _norm(squares):
    """The square root, at least 1e-12 as in torch.nn.functional.normalize; NaN stays NaN."""
    norm = tl.sqrt_rn(squares)
    return tl.where(norm < 1e-12, 1e-12, norm)


@jit
def _attention_kernel(
    student_ptr,  # [B, P, Cs]: a channels-last map seen as rows of channels
    teacher_ptr,  # [B, P, Ct]
    upstream_ptr,  # scalar fp32, or None: 1
    loss_ptr,  # [B] fp32, the share of each image; or None
    gradient_ptr,  # [B, P, Cs], every element written exactly once; or None
    positions,
    inverse_count,
    STUDENT_CHANNELS: tl.constexpr,
    TEACHER_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    STUDENT_BLOCK: tl.constexpr,
    TEACHER_BLOCK: tl.constexpr,
):
    """One program does one image in one tile. Squares are taken in fp32: in fp16 they overflow from 256."""
    image = tl.program_id(0).to(tl.int64)
    student_ptr += image * positions * STUDENT_CHANNELS
    teacher_ptr += image * positions * TEACHER_CHANNELS
    if gradient_ptr is not None:
        gradient_ptr += image * positions * STUDENT_CHANNELS
    slope = 4.0 / STUDENT_CHANNELS * inverse_count
    if upstream_ptr is not None:
        slope *= tl.load(upstream_ptr)
    offs_p = tl.arange(0, BLOCK_POSITIONS)
    offs, mask, values = _tile(student_ptr, 0, offs_p, positions, 0, STUDENT_CHANNELS, STUDENT_BLOCK)
    student = tl.sum(values * values, axis=1) / STUDENT_CHANNELS
    teacher = _attention(teacher_ptr, 0, offs_p, positions, TEACHER_CHANNELS, TEACHER_BLOCK)
    student_norm, teacher_norm = _norm(tl.sum(student * student)), _norm(tl.sum(teacher * teacher))
    student /= student_norm
    difference = student - teacher / teacher_norm
    distance, along = tl.sum(difference * difference), tl.sum(difference * student)
    if gradient_ptr is not None:
        along = tl.where(student_norm > 1e-12, along, along * 0.0)  # a norm at its lower bound is a constant
        coefficient = slope * ((difference - student * along) / student_norm)
        tl.store(gradient_ptr + offs, coefficient[:, None] * values, mask=mask)
    if loss_ptr is not None:  # last: stored before the gradient, the loss made the compiler spill registers
        tl.store(loss_ptr + image, distance * inverse_count)


@jit
def _tiled_attention_kernel(
    student_ptr,
    teacher_ptr,
    upstream_ptr,
    loss_ptr,
    gradient_ptr,
    positions,
    inverse_count,
    STUDENT_CHANNELS: tl.constexpr,
    TEACHER_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    STUDENT_BLOCK: tl.constexpr,
    TEACHER_BLOCK: tl.constexpr,
):
    """The same for a map of any size, in tiles of BLOCK_POSITIONS positions and STUDENT_BLOCK channels."""
    image = tl.program_id(0).to(tl.int64)
    student_ptr += image * positions * STUDENT_CHANNELS
    teacher_ptr += image * positions * TEACHER_CHANNELS
    slope = 4.0 / STUDENT_CHANNELS * inverse_count
    if upstream_ptr is not None:
        slope *= tl.load(upstream_ptr)
    offs_p = tl.arange(0, BLOCK_POSITIONS)
    student_squares = tl.zeros([BLOCK_POSITIONS], tl.float32)
    teacher_squares = tl.zeros([BLOCK_POSITIONS], tl.float32)
    for first in range(0, positions, BLOCK_POSITIONS):
        student = _attention(student_ptr, first, offs_p, positions, STUDENT_CHANNELS, STUDENT_BLOCK)
        teacher = _attention(teacher_ptr, first, offs_p, positions, TEACHER_CHANNELS, TEACHER_BLOCK)
        student_squares += student * student
        teacher_squares += teacher * teacher
    student_norm, teacher_norm = _norm(tl.sum(student_squares)), _norm(tl.sum(teacher_squares))
    distances = tl.zeros([BLOCK_POSITIONS], tl.float32)
    products = tl.zeros([BLOCK_POSITIONS], tl.float32)
    for first in range(0, positions, BLOCK_POSITIONS):
        student = _attention(student_ptr, first, offs_p, positions, STUDENT_CHANNELS, STUDENT_BLOCK)
        teacher = _attention(teacher_ptr, first, offs_p, positions, TEACHER_CHANNELS, TEACHER_BLOCK)
        student /= student_norm
        difference = student - teacher / teacher_norm
        distances += difference * difference
        products += difference * student
    if loss_ptr is not None:
        tl.store(loss_ptr + image, tl.sum(distances) * inverse_count)
    if gradient_ptr is not None:
        along = tl.sum(products)
        along = tl.where(student_norm > 1e-12, along, along * 0.0)
        gradient_ptr += image * positions * STUDENT_CHANNELS
        for first in range(0, positions, BLOCK_POSITIONS):
            student = _attention(student_ptr, first, offs_p, positions, STUDENT_CHANNELS, STUDENT_BLOCK)
            teacher = _attention(teacher_ptr, first, offs_p, positions, TEACHER_CHANNELS, TEACHER_BLOCK)
            student /= student_norm
            difference = student - teacher / teacher_norm
            coefficient = slope * ((difference - student * along) / student_norm)
            tile_ptr = gradient_ptr + tl.cast(first, tl.int64) * STUDENT_CHANNELS
            for channel in range(0, STUDENT_CHANNELS, STUDENT_BLOCK):
                offs, mask, values = _tile(
                    student_ptr, first, offs_p, positions, channel, STUDENT_CHANNELS, STUDENT_BLOCK
                )
                tl.store(tile_ptr + offs, coefficient[:, None] * values, mask=mask)


def _cut(student_channels: int, teacher_channels: int, positions: int) -> tuple[object, dict]:
    """Choose the kernel for images of this size, and how it cuts them into tiles."""
    kernel, block_positions = _attention_kernel, triton.next_power_of_2(positions)
    student_block = triton.next_power_of_2(student_channels)
    if block_positions * student_block > _IN_REGISTERS:
        kernel, block_positions = _tiled_attention_kernel, min(block_positions, _POSITIONS)
        student_block = min(student_block, _TILE // block_positions)
    # 128 images on 132 multiprocessors: one program on each. 32 values in each thread hide the latency.
    tile = max(block_positions * student_block, _TILE // 4)
    teacher_block = max(1, min(triton.next_power_of_2(teacher_channels), _TILE // block_positions))
    cut = {"STUDENT_CHANNELS": student_channels, "TEACHER_CHANNELS": teacher_channels}
    cut |= {
        "BLOCK_POSITIONS": block_positions,
        "STUDENT_BLOCK": student_block,
        "TEACHER_BLOCK": teacher_block,
    }
    return kernel, cut | {"num_warps": 16 if tile > 8192 else 8 if tile > 4096 else 4}


def _pass(student, teacher, factor, with_gradient, upstream, loss, gradient, nothing):
    images, channels, positions = *student.shape[:2], student.shape[2] * student.shape[3]
    shares = nothing.new_empty(images) if upstream is None else None
    if student.numel():
        kernel, cut = _cut(channels, teacher.shape[1], positions)
        tensors = (student, teacher, upstream, shares, gradient if with_gradient else None)
        launch(kernel, (images,), *tensors, positions, factor / (images * positions), **cut)
    if upstream is None:
        loss = shares.sum() if student.numel() else loss.fill_(float("nan"))  # the mean of nothing
    return loss, gradient, nothing


def _backward(ctx, upstream, *_):
    (student, teacher, factor, *_), gradient, _ = begin_backward("attention_transfer", ctx, upstream)
    teacher_gradient = None
    if gradient is None and ctx.needs_input_grad[0]:
        gradient = _attention_transfer(student, teacher, factor, True, upstream)[1]
    if ctx.needs_input_grad[1]:  # the loss is symmetric
        teacher_gradient = _attention_transfer(teacher, student, factor, True, upstream)[1]
    return gradient, teacher_gradient, None, None, None


_SCHEMA = "Tensor student, Tensor teacher, float factor"
_attention_transfer = operator("attention_transfer_pass", _SCHEMA, _pass, _backward)


def attention_transfer(
    student: Tensor, teacher: Tensor, *, factor: float = 1.0, impl: str = "auto"
) -> Tensor:
    """Mean squared difference of two attention maps, over images and positions.

    student: [B, Cs, H, W], teacher: [B, Ct, H, W], any floating dtype; the numbers of channels may differ.
    factor, impl, result and errors: as in vid_nll.  Source: Zagoruyko and Komodakis, ICLR 2017.
    """
    op, maps = "attention_transfer", {"student": student, "teacher": teacher}
    checks.maps(op, **maps)
    checks.numbers(op, factor=factor)
    if checks.choose(op, impl, maps) == "triton":
        return _attention_transfer(student, teacher, factor, one_pass(student), None)[0]
    return factor * reference.attention_transfer(*checks.upcast(student, teacher))
