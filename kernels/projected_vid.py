"""The last 1x1 convolution of a VID regressor and its negative log-likelihood in one kernel.

    mean = weight · hidden + bias            loss = vid_nll(mean, target, raw_scale)            d = ∂loss/∂mean   (vid.py)
    ∂loss/∂hidden = weightᵀ · d              ∂loss/∂weight = Σ_m d · hiddenᵀ                    ∂loss/∂bias = Σ_m d

M = B·H·W rows, C channels of the target, K of the hidden map. A tile of the mean lives in registers only: multiply, subtract,
multiply back by the weight, and add up the weight's gradient, all while the tiles of both maps are at hand. With K = 2C, one pass
moves (2K + C)·M·itemsize bytes: 5 maps of C channels, where convolution, loss and their backward move 12, or 9 with vid_nll. In fp16,
where the gradient waits for its scale, 3 and 5. The partial sums of the weight's gradient (programs·C·K fp32) stay in the L2. At 128
channels two programs share the hidden channels of a tile, and both read all of it and the target: the second finds them in the L2.

16-bit maps of up to 128 channels from as many hidden ones or twice as many run here (a width between two powers of two is filled up).
Anything else is a convolution and vid_nll: in fp32 a kernel would have to choose between the tensor cores and the user's TF32
setting, and a wider weight does not fit beside its gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastvid.kernels import checks
from fastvid.kernels.launch import (
    OPTIONS,
    cdiv,
    dense,
    first_derivative_only,
    jit,
    one_pass,
    power_of_two,
    save,
    saved,
    scale,
    tl,
)
from fastvid.kernels.vid import (
    FINISH_TILE,
    FINISH_WARPS,
    column_sums,
    finish_channels,
    inverse_count,
    variance_of,
    vid_nll,
)
from torch import Tensor

_SUM_BLOCK = 64  # elements of the weight's gradient that one program adds up: 256-byte rows, and enough programs for all rows at once


class _Launch(NamedTuple):
    """How a C x K projection is cut."""

    rows: int
    """of one tile"""
    slice: int
    """hidden channels that a program owns; it computes the mean from all, and the gradients of its own"""
    warps: int
    stages: int
    """tiles in flight"""
    programs: int
    """over the rows, for each slice: two to four a multiprocessor of an H100, so few that their partial sums stay below the maps"""


# By (C, K), each rounded up to a power of two. The accumulators (mean, gradients of hidden and weight) decide: these cuts keep them in
# registers on sm_80, sm_90, sm_100 and sm_120, and the tiles within 100 KB of shared memory. The last two keep to the larger shared
# memory and the narrower accumulators of sm_90 and sm_100; elsewhere they spill.
_LAUNCHES = {
    (16, 16): _Launch(rows=64, slice=16, warps=4, stages=2, programs=512),
    (16, 32): _Launch(rows=64, slice=32, warps=4, stages=2, programs=512),
    (32, 32): _Launch(rows=64, slice=32, warps=4, stages=1, programs=512),
    (32, 64): _Launch(rows=64, slice=64, warps=4, stages=2, programs=512),
    (64, 64): _Launch(rows=64, slice=64, warps=8, stages=1, programs=128),
    (64, 128): _Launch(rows=64, slice=128, warps=8, stages=2, programs=128),
    (128, 128): _Launch(rows=32, slice=64, warps=8, stages=2, programs=64),
    (128, 256): _Launch(rows=32, slice=128, warps=8, stages=2, programs=64),
}


def _blocks(channels: int, hidden: int) -> tuple[int, int]:
    """Both widths as the dots take them; 16 is the least side of a tensor core's operand."""
    return power_of_two(channels, least=16), power_of_two(hidden, least=16)


def _fits(hidden: Tensor, weight: Tensor, target: Tensor) -> bool:
    """Whether the kernel takes this projection: 16-bit, not empty, of a width in the table, with a target that no gradient flows to."""
    blocks, capability = _blocks(*weight.shape[:2]), _capability(hidden)
    return (
        hidden.dtype in (torch.bfloat16, torch.float16)
        and blocks in _LAUNCHES
        and target.numel() > 0
        and not target.requires_grad
        and capability >= 8
        and (blocks[0] < 128 or capability in (9, 10))
    )


def _capability(tensor: Tensor) -> int:
    """Major compute capability of the tensor's GPU; the interpreter, which has no limits, counts as Hopper."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 9


@jit
def _projection_kernel(
    hidden_ptr,  # [M, K] row-major: a channels-last map seen as rows of channels
    weight_ptr,  # [C, K], any floating dtype; multiplied in the dtype of hidden
    bias_ptr,  # [C], or None
    target_ptr,  # [M, C]
    raw_scale_ptr,  # [C]
    upstream_ptr,  # scalar fp32, or None: 1
    square_ptr,  # [programs, C] fp32 sums of squared residuals; or None: gradients only
    residual_ptr,  # [programs, C] fp32 sums of residuals
    hidden_gradient_ptr,  # [M, K], every element written exactly once; or None: loss only
    weight_partial_ptr,  # [programs, C, K] fp32
    rows,
    tiles,
    eps,
    inverse_count,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    SLICE: tl.constexpr,
):
    """One program takes `tiles` tiles of rows and owns one slice of hidden channels; with several slices each computes the mean.

    The dots take 16-bit operands and accumulate in fp32. The mean is not rounded in between.
    """
    SLICES: tl.constexpr = BLOCK_HIDDEN // SLICE
    program, own = tl.program_id(0), tl.program_id(1)
    offs_c = tl.arange(0, BLOCK_CHANNELS)
    mask_c = offs_c < CHANNELS
    offs_k = own * SLICE + tl.arange(0, SLICE)
    first = program.to(tl.int64) * tiles * BLOCK_ROWS  # int64 here alone: within a program int32 suffices
    hidden_ptr += first * HIDDEN
    target_ptr += first * CHANNELS
    weight = _slice(weight_ptr, offs_c, mask_c, offs_k, HIDDEN).to(hidden_ptr.dtype.element_ty)
    bias = tl.zeros([BLOCK_CHANNELS], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    slope = inverse_count / variance_of(raw_scale_ptr, offs_c, mask_c, eps)
    if upstream_ptr is not None:
        slope *= tl.load(upstream_ptr)
    squares = tl.zeros([BLOCK_CHANNELS], tl.float32)
    residuals = tl.zeros([BLOCK_CHANNELS], tl.float32)
    weight_gradient = tl.zeros([BLOCK_CHANNELS, SLICE], tl.float32)
    for tile in range(tiles):
        offs_m = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask_m = offs_m < rows - first
        mean = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
        for step in tl.static_range(1, SLICES):
            offs_other = (own + step) % SLICES * SLICE + tl.arange(0, SLICE)
            other = _slice(hidden_ptr, offs_m, mask_m, offs_other, HIDDEN)
            mean = tl.dot(
                other, tl.trans(_slice(weight_ptr, offs_c, mask_c, offs_other, HIDDEN).to(other.dtype)), mean
            )
        hidden = _slice(hidden_ptr, offs_m, mask_m, offs_k, HIDDEN)
        mean = tl.dot(hidden, tl.trans(weight), mean)
        target = _slice(target_ptr, offs_m, mask_m, offs_c, CHANNELS).to(tl.float32)
        residual = tl.where(mask_m[:, None] & mask_c[None, :], mean + bias[None, :] - target, 0.0)
        if square_ptr is not None:
            squares += tl.sum(residual * residual, axis=0)
            residuals += tl.sum(residual, axis=0)
        if hidden_gradient_ptr is not None:
            gradient = (residual * slope[None, :]).to(hidden.dtype)
            offs = offs_m[:, None] * HIDDEN + offs_k[None, :]
            tl.store(
                hidden_gradient_ptr + first * HIDDEN + offs,
                tl.dot(gradient, weight),
                mask=mask_m[:, None] & (offs_k < HIDDEN)[None, :],
            )
            weight_gradient = tl.dot(tl.trans(gradient), hidden, weight_gradient)
    if square_ptr is not None:
        if own == 0:
            tl.store(square_ptr + program * CHANNELS + offs_c, squares, mask=mask_c)
            tl.store(residual_ptr + program * CHANNELS + offs_c, residuals, mask=mask_c)
    if hidden_gradient_ptr is not None:
        offs = offs_c[:, None] * HIDDEN + offs_k[None, :]
        tl.store(
            weight_partial_ptr + program * CHANNELS * HIDDEN + offs,
            weight_gradient,
            mask=mask_c[:, None] & (offs_k < HIDDEN)[None, :],
        )


@jit
def _slice(pointer, offs_rows, mask_rows, offs_columns, COLUMNS: tl.constexpr):
    """A tile of a row-major matrix of COLUMNS columns; zero beyond its edges."""
    mask = mask_rows[:, None] & (offs_columns < COLUMNS)[None, :]
    return tl.load(pointer + offs_rows[:, None] * COLUMNS + offs_columns[None, :], mask=mask, other=0.0)


@jit
def _finish_kernel(
    square_ptr,
    residual_ptr,  # [programs, C] fp32 partial sums
    weight_partial_ptr,  # [programs, C, K] fp32, or None
    raw_scale_ptr,
    loss_ptr,
    parameters_ptr,  # fp32: weight [C, K] if there are partial sums of it, then raw_scale [C], bias [C]
    programs,
    eps,
    factor,
    inverse_count,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WEIGHT_PROGRAMS: tl.constexpr,
):
    """The first program finishes what has C elements, each other one a block of the weight's gradient."""
    block = tl.program_id(0)
    scale_gradient_ptr = parameters_ptr
    if weight_partial_ptr is not None:
        scale_gradient_ptr += CHANNELS * HIDDEN
    if block == 0:
        offs_c, mask_c, variance = finish_channels(
            square_ptr,
            raw_scale_ptr,
            loss_ptr,
            scale_gradient_ptr,
            0,
            programs,
            eps,
            factor,
            inverse_count,
            CHANNELS,
            BLOCK_CHANNELS,
            BLOCK_PROGRAMS,
        )
        residuals = column_sums(residual_ptr, programs, offs_c, mask_c, CHANNELS, BLOCK_PROGRAMS)
        tl.store(scale_gradient_ptr + CHANNELS + offs_c, residuals * inverse_count / variance, mask=mask_c)
    elif weight_partial_ptr is not None:
        offs_w = (block - 1) * BLOCK + tl.arange(0, BLOCK)
        mask_w = offs_w < CHANNELS * HIDDEN
        sums = column_sums(
            weight_partial_ptr, programs, offs_w, mask_w, CHANNELS * HIDDEN, BLOCK_WEIGHT_PROGRAMS
        )
        tl.store(parameters_ptr + offs_w, sums, mask=mask_w)


def _launch(hidden, weight, bias, target, raw_scale, upstream, eps, factor, *, with_loss, with_gradient):
    """The projection kernel over all rows: partial sums of squares and residuals [2, programs, C], the gradient of hidden and
    partial sums [programs, C, K] of the weight's; None for what was not asked."""
    (channels, width), rows = weight.shape[:2], target.numel() // target.shape[1]
    block_channels, block_hidden = _blocks(channels, width)
    cut = _LAUNCHES[block_channels, block_hidden]
    tiles = cdiv(rows, cut.rows)
    tiles_each = cdiv(tiles, cut.programs)
    programs = cdiv(tiles, tiles_each)
    scalars = {"dtype": torch.float32, "device": hidden.device}
    squares, residuals = torch.empty(2, programs, channels, **scalars) if with_loss else (None, None)
    gradient = torch.empty_like(hidden) if with_gradient else None
    weight_partial = torch.empty(programs, channels, width, **scalars) if with_gradient else None
    with torch.cuda.device_of(hidden):
        _projection_kernel[(programs, block_hidden // cut.slice if with_gradient else 1)](
            hidden,
            weight,
            bias,
            target,
            raw_scale,
            upstream,
            squares,
            residuals,
            gradient,
            weight_partial,
            rows,
            tiles_each,
            eps,
            inverse_count(target, factor),
            CHANNELS=channels,
            HIDDEN=width,
            BLOCK_ROWS=cut.rows,
            BLOCK_CHANNELS=block_channels,
            BLOCK_HIDDEN=block_hidden,
            SLICE=cut.slice,
            num_warps=cut.warps,
            num_stages=cut.stages,
            **OPTIONS,
        )
    return squares, residuals, gradient, weight_partial


@torch.library.custom_op("fastvid::projected_vid_nll", mutates_args=())
def _projected_vid_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    raw_scale: Tensor,
    eps: float,
    factor: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The third output holds the gradients of weight, if asked, raw_scale and bias in one row."""
    weight, bias, raw_scale = map(dense, (weight, bias, raw_scale))
    squares, residuals, gradient, weight_partial = _launch(
        hidden,
        weight,
        bias,
        target,
        raw_scale,
        None,
        eps,
        factor,
        with_loss=True,
        with_gradient=with_gradient,
    )
    programs, channels = squares.shape
    width = hidden.shape[1]
    size = channels * width if with_gradient else 0
    loss, parameters = squares.new_empty(()), squares.new_empty(2 * channels + size)
    block_channels = power_of_two(channels)
    with torch.cuda.device_of(hidden):
        _finish_kernel[(1 + cdiv(size, _SUM_BLOCK),)](
            squares,
            residuals,
            weight_partial,
            raw_scale,
            loss,
            parameters,
            programs,
            eps,
            factor,
            inverse_count(target, factor),
            CHANNELS=channels,
            HIDDEN=width,
            BLOCK_CHANNELS=block_channels,
            BLOCK_PROGRAMS=FINISH_TILE // block_channels,
            BLOCK=_SUM_BLOCK,
            BLOCK_WEIGHT_PROGRAMS=FINISH_TILE // _SUM_BLOCK,
            num_warps=FINISH_WARPS,
            **OPTIONS,
        )
    return loss, hidden.new_empty(0) if gradient is None else gradient, parameters


@_projected_vid_nll.register_fake
def _(hidden, weight, bias, target, raw_scale, eps, factor, with_gradient):
    size = 2 * weight.shape[0] + (weight.shape[0] * weight.shape[1] if with_gradient else 0)
    gradient = torch.empty_like(hidden) if with_gradient else hidden.new_empty(0)
    return hidden.new_empty((), dtype=torch.float32), gradient, hidden.new_empty(size, dtype=torch.float32)


@torch.library.custom_op("fastvid::projected_vid_nll_gradient", mutates_args=())
def _projected_vid_nll_gradient(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    raw_scale: Tensor,
    eps: float,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and of weight (fp32 [C, K]) from the maps themselves."""
    _, _, gradient, weight_partial = _launch(
        hidden,
        dense(weight),
        dense(bias),
        target,
        dense(raw_scale),
        upstream,
        eps,
        factor,
        with_loss=False,
        with_gradient=True,
    )
    return gradient, weight_partial.sum(0)


@_projected_vid_nll_gradient.register_fake
def _(upstream, hidden, weight, bias, target, raw_scale, eps, factor):
    return torch.empty_like(hidden), hidden.new_empty(weight.shape[:2], dtype=torch.float32)


def _backward(ctx, upstream, *_):
    (hidden, weight, bias, target, raw_scale, eps, factor, _), parameters = saved(ctx)
    first_derivative_only("projected_vid_nll", upstream)
    hidden_gradient, parameters = scale(ctx, upstream, parameters)
    channels = weight.shape[0]
    weight_gradient, scale_gradient, bias_gradient = (
        parameters[: -2 * channels],
        parameters[-2 * channels : -channels],
        parameters[-channels:],
    )
    if hidden_gradient is None and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
        hidden_gradient, weight_gradient = _projected_vid_nll_gradient(
            upstream, hidden, weight, bias, target, raw_scale, eps, factor
        )
    needs = ctx.needs_input_grad
    return (
        hidden_gradient if needs[0] else None,
        _like(weight_gradient.to(weight.dtype), weight) if needs[1] else None,
        bias_gradient.to(bias.dtype) if needs[2] else None,
        None,
        scale_gradient.to(raw_scale.dtype) if needs[4] else None,
        None,
        None,
        None,
    )


def _like(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient [C·K] in the shape of the weight, and in its strides where it is contiguous or channels-last: DDP wants them equal."""
    channels, width = weight.shape[:2]
    if weight.stride() == (width, 1, width, width):
        return gradient.view(channels, 1, 1, width).permute(
            0, 3, 1, 2
        )  # of the row's start: Inductor of torch 2.11 loses an offset
    return gradient.view(weight.shape)


_projected_vid_nll.register_autograd(_backward, setup_context=save)


def projected_vid_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    raw_scale: Tensor,
    *,
    eps: float = 1e-5,
    factor: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """vid_nll whose mean is a 1x1 convolution of `hidden`, as the last layer of a regressor is.

    hidden: [B, K, H, W].  weight: [C, K, 1, 1].  bias: [C] or None.  target: [B, C, H, W].  raw_scale: [C].
    The convolution runs in the dtype of autocast or of `hidden`, the loss in fp32. factor, impl, result and errors: as in vid_nll.
    With Triton it is one kernel for 16-bit maps of up to 128 channels, from as many hidden ones or twice as many, and a target that
    needs no gradient; otherwise PyTorch's convolution and the kernel of vid_nll.
    """
    op = "projected_vid_nll"
    checks.maps(op, hidden=hidden, target=target)
    checks.shape(op, "weight", weight, (target.shape[1], hidden.shape[1], 1, 1))
    checks.shape(op, "raw_scale", raw_scale, (target.shape[1],))
    if bias is not None:
        checks.shape(op, "bias", bias, (target.shape[1],))
    checks.numbers(op, eps=eps, factor=factor)
    chosen = checks.choose(
        op, impl, hidden=hidden, weight=weight, bias=bias, target=target, raw_scale=raw_scale
    )
    if chosen == "triton":
        checks.channels_last(op, hidden=hidden, target=target)
        if _fits(hidden, weight, target):
            return _projected_vid_nll(hidden, weight, bias, target, raw_scale, eps, factor, one_pass(hidden))[
                0
            ]
    mean = F.conv2d(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    if chosen == "triton":
        mean = mean.contiguous(
            memory_format=torch.channels_last
        )  # as it is, but where one channel leaves the layout open
    return vid_nll(mean, target, raw_scale, eps=eps, factor=factor, impl=impl)
