"""Gaussian negative log-likelihood of a teacher feature map (VID), fused.

    loss = factor/(M·C) · Σ_c ½ [ S_c / v_c + M·log v_c ],   S_c = Σ_m (mean - target)²,   v = softplus(raw_scale) + eps
    ∂loss/∂mean = factor/(M·C) · (mean - target) / v         ∂loss/∂raw_scale = factor/(2C) · sigmoid(raw_scale) · (1 - S/(M·v)) / v

M = B·H·W rows, C channels. The constant ½·log 2π is left out. The mean squared error is the same sum at v = ½ without its log.

The only reduction over M is S_c, and the gradient of the mean needs nothing else, so one pass reads both maps and writes the
gradient: 3 map-sized transfers in all, 3·M·C·itemsize bytes, plus C-sized work (launch.py says how backward stays out of it).
Without a gradient: 2. In fp16: 2 in forward and 3 in backward. A gradient of the target is a pass of its own: 3 more.
"""

from __future__ import annotations

import torch
from fastvid.kernels import checks, reference
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
from torch import Tensor

# 4,096 elements and 4 warps: each thread has four 16-byte loads of both bf16 maps in flight, 16 KB a program.
_TILE = 4096
_WIDEST = 128  # channels of one tile; a 256-byte row of bf16 is two full cache lines
# Four programs for each of an H100's 132 multiprocessors, so that one round of them reads the map, and few partial sums
# remain. A constant, not the machine's count: the bits of a sum depend on how it is cut.
_PROGRAMS = 512
# The finishing program is alone and waits for memory: 16 warps with 16 values a thread in flight end it in one to four rounds.
FINISH_TILE, FINISH_WARPS = 8192, 16


@jit
def _softplus(x):
    """log(1 + exp(x)) as PyTorch has it: x itself from 20 on. log1p is not in Triton's language, hence the quotient."""
    u = tl.exp(tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL))
    w = 1.0 + u
    return tl.where(x > 20.0, x, tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0))))


@jit
def variance_of(raw_scale_ptr, offs_c, mask_c, eps):
    """Variance [BLOCK_CHANNELS] of each channel: ½ where there is no scale, and 1 beyond the last channel."""
    if raw_scale_ptr is None:
        variance = tl.full(offs_c.shape, 0.5, tl.float32)
    else:
        raw = tl.load(raw_scale_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        variance = tl.where(mask_c, _softplus(raw) + eps, 1.0)
    return variance


@jit
def _residual_kernel(
    mean_ptr,  # [M, C] row-major: a channels-last map seen as rows of channels
    target_ptr,  # [M, C] same layout, may differ in dtype
    raw_scale_ptr,  # [C], or None: mean squared error
    upstream_ptr,  # scalar fp32, or None: 1
    partial_ptr,  # [programs, C] fp32, every element written exactly once; or None
    gradient_ptr,  # [M, C] gradient of the mean, every element written exactly once; or None
    rows,
    tiles,
    eps,
    inverse_count,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program reads `tiles` tiles of rows, sums (mean - target)² over them and writes their gradient.

    Both maps are upcast before subtracting: in fp16 the square overflows from |residual| = 256.
    No atomics, so equal inputs give equal bits.
    """
    offs_c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask_c = offs_c < CHANNELS
    first = (
        tl.program_id(0).to(tl.int64) * tiles * BLOCK_ROWS
    )  # int64 here alone: within a program int32 suffices
    mean_ptr += first * CHANNELS
    target_ptr += first * CHANNELS
    if gradient_ptr is not None:
        gradient_ptr += first * CHANNELS
        slope = inverse_count / variance_of(raw_scale_ptr, offs_c, mask_c, eps)
        if upstream_ptr is not None:
            slope *= tl.load(upstream_ptr)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for tile in range(tiles):
        offs_m = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offs = offs_m[:, None] * CHANNELS + offs_c[None, :]
        mask = (offs_m < rows - first)[:, None] & mask_c[None, :]
        mean = tl.load(mean_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        residual = mean - tl.load(target_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if partial_ptr is not None:
            squares += residual * residual
        if gradient_ptr is not None:
            tl.store(gradient_ptr + offs, residual * slope[None, :], mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0) * CHANNELS + offs_c, tl.sum(squares, axis=0), mask=mask_c)


@jit
def column_sums(partial_ptr, programs, offs_c, mask_c, CHANNELS: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr):
    """Sums [BLOCK_CHANNELS] over the rows of [programs, C], in an order that depends on the shape alone."""
    sums = tl.zeros([BLOCK_PROGRAMS, offs_c.shape[0]], tl.float32)
    for first in range(0, programs, BLOCK_PROGRAMS):
        offs_p = first + tl.arange(0, BLOCK_PROGRAMS)
        mask = (offs_p < programs)[:, None] & mask_c[None, :]
        sums += tl.load(partial_ptr + offs_p[:, None] * CHANNELS + offs_c[None, :], mask=mask, other=0.0)
    return tl.sum(sums, axis=0)


@jit
def finish_channels(
    square_ptr,  # [programs, C] fp32 partial sums of the squared residuals
    raw_scale_ptr,  # [C], or None: mean squared error
    loss_ptr,  # [channel blocks] fp32, each block's share
    scale_gradient_ptr,  # [C] fp32; not touched without a scale
    block,
    programs,
    eps,
    factor,
    inverse_count,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
    """The loss and the gradient of raw_scale for one block of channels. Returns its channels, their mask and variances."""
    offs_c = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask_c = offs_c < CHANNELS
    variance = variance_of(raw_scale_ptr, offs_c, mask_c, eps)
    squares = column_sums(square_ptr, programs, offs_c, mask_c, CHANNELS, BLOCK_PROGRAMS)
    quotient = squares * inverse_count / variance
    if raw_scale_ptr is None:
        tl.store(loss_ptr + block, 0.5 * tl.sum(quotient))
    else:
        share = factor / CHANNELS
        tl.store(loss_ptr + block, 0.5 * tl.sum(tl.where(mask_c, quotient + share * tl.log(variance), 0.0)))
        raw = tl.load(raw_scale_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        slope = 0.5 * tl.sigmoid(raw) * (share - quotient) / variance
        tl.store(scale_gradient_ptr + offs_c, slope, mask=mask_c)
    return offs_c, mask_c, variance


@jit
def _finish_kernel(
    square_ptr,
    raw_scale_ptr,
    loss_ptr,
    scale_gradient_ptr,
    programs,
    eps,
    factor,
    inverse_count,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
    """One program per block of channels."""
    finish_channels(
        square_ptr,
        raw_scale_ptr,
        loss_ptr,
        scale_gradient_ptr,
        tl.program_id(0),
        programs,
        eps,
        factor,
        inverse_count,
        CHANNELS,
        BLOCK_CHANNELS,
        BLOCK_PROGRAMS,
    )


def _launch(mean, target, raw_scale, upstream, eps, factor, *, with_loss, with_gradient):
    """The residual kernel over all rows. Returns the partial sums [programs, C] and the gradient of the mean, or None for each."""
    channels = mean.shape[1]
    rows = mean.numel() // channels
    block_channels = min(power_of_two(channels), _WIDEST)
    block_rows = _TILE // block_channels
    tiles = cdiv(max(rows, 1), block_rows)
    channel_blocks = cdiv(channels, block_channels)
    tiles_each = min(
        cdiv(tiles, max(1, _PROGRAMS // channel_blocks)), max(1, 2**31 // (block_rows * channels))
    )
    programs = cdiv(tiles, tiles_each)
    partial = torch.empty(programs, channels, dtype=torch.float32, device=mean.device) if with_loss else None
    gradient = torch.empty_like(mean) if with_gradient else None
    with torch.cuda.device_of(mean):
        _residual_kernel[(programs, channel_blocks)](
            mean,
            target,
            raw_scale,
            upstream,
            partial,
            gradient,
            rows,
            tiles_each,
            eps,
            inverse_count(mean, factor),
            CHANNELS=channels,
            BLOCK_ROWS=block_rows,
            BLOCK_CHANNELS=block_channels,
            num_warps=4,
            **OPTIONS,
        )
    return partial, gradient


def inverse_count(target: Tensor, factor: float) -> float:
    """factor/(M·C). An empty batch has the loss 0/0."""
    return factor / target.numel() if target.numel() else float("nan")


@torch.library.custom_op("fastvid::vid_nll", mutates_args=())
def _vid_nll(
    mean: Tensor, target: Tensor, raw_scale: Tensor | None, eps: float, factor: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    raw_scale = dense(raw_scale)
    partial, gradient = _launch(
        mean, target, raw_scale, None, eps, factor, with_loss=True, with_gradient=with_gradient
    )
    programs, channels = partial.shape
    block_channels = min(power_of_two(channels), _WIDEST)
    blocks = cdiv(channels, block_channels)
    loss, scale_gradient = partial.new_empty(blocks), partial.new_empty(0 if raw_scale is None else channels)
    with torch.cuda.device_of(mean):
        _finish_kernel[(blocks,)](
            partial,
            raw_scale,
            loss,
            scale_gradient,
            programs,
            eps,
            factor,
            inverse_count(mean, factor),
            CHANNELS=channels,
            BLOCK_CHANNELS=block_channels,
            BLOCK_PROGRAMS=FINISH_TILE // block_channels,
            num_warps=FINISH_WARPS,
            **OPTIONS,
        )
    return (
        loss.sum() if blocks > 1 else loss.view(()),
        mean.new_empty(0) if gradient is None else gradient,
        scale_gradient,
    )


@_vid_nll.register_fake
def _(mean, target, raw_scale, eps, factor, with_gradient):
    gradient = torch.empty_like(mean) if with_gradient else mean.new_empty(0)
    channels = 0 if raw_scale is None else mean.shape[1]
    return mean.new_empty((), dtype=torch.float32), gradient, mean.new_empty(channels, dtype=torch.float32)


@torch.library.custom_op("fastvid::vid_nll_gradient", mutates_args=())
def _vid_nll_gradient(
    upstream: Tensor, mean: Tensor, target: Tensor, raw_scale: Tensor | None, eps: float, factor: float
) -> Tensor:
    """Gradient of `mean` from the maps themselves. That of `target` is this one with the maps in each other's place."""
    return _launch(
        mean, target, dense(raw_scale), upstream, eps, factor, with_loss=False, with_gradient=True
    )[1]


@_vid_nll_gradient.register_fake
def _(upstream, mean, target, raw_scale, eps, factor):
    return torch.empty_like(mean)


def _backward(ctx, upstream, *_):
    (mean, target, raw_scale, eps, factor, _), scale_gradient = saved(ctx)
    first_derivative_only("mean_squared_error" if raw_scale is None else "vid_nll", upstream)
    mean_gradient, scale_gradient = scale(ctx, upstream, scale_gradient)
    target_gradient = None
    if mean_gradient is None and ctx.needs_input_grad[0]:
        mean_gradient = _vid_nll_gradient(upstream, mean, target, raw_scale, eps, factor)
    if ctx.needs_input_grad[1]:
        target_gradient = _vid_nll_gradient(upstream, target, mean, raw_scale, eps, factor)
    scale_gradient = scale_gradient.to(raw_scale.dtype) if ctx.needs_input_grad[2] else None
    return mean_gradient, target_gradient, scale_gradient, None, None, None


_vid_nll.register_autograd(_backward, setup_context=save)


def vid_nll(
    mean: Tensor,
    target: Tensor,
    raw_scale: Tensor,
    *,
    eps: float = 1e-5,
    factor: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Negative log-likelihood of `target` under a Gaussian with one learned variance per channel, averaged over elements.

    mean, target: [B, C, H, W], any floating dtype.  raw_scale: [C]; the variance is softplus(raw_scale) + eps.
    factor: multiplies the loss; on a GPU better here than outside, because backward then need not touch the map again.
    Returns a scalar, fp32 (fp64 for fp64 input).  impl: auto (Triton for CUDA tensors, else the reference), triton or reference.
    Triton wants channels-last maps of fp32, bf16 or fp16 and has first derivatives only.
    Raises ValueError on shapes, dtypes or layouts that do not fit.  Source: Ahn et al., CVPR 2019.
    """
    checks.maps("vid_nll", mean=mean, target=target)
    checks.shape("vid_nll", "target", target, tuple(mean.shape))
    checks.shape("vid_nll", "raw_scale", raw_scale, (mean.shape[1],))
    checks.numbers("vid_nll", eps=eps, factor=factor)
    if checks.choose("vid_nll", impl, mean=mean, target=target, raw_scale=raw_scale) == "triton":
        checks.channels_last("vid_nll", mean=mean, target=target)
        return _vid_nll(mean, target, raw_scale, eps, factor, one_pass(mean))[0]
    return factor * reference.vid_nll(*checks.upcast(mean, target, raw_scale), eps=eps)


def mean_squared_error(
    prediction: Tensor, target: Tensor, *, factor: float = 1.0, impl: str = "auto"
) -> Tensor:
    """Mean squared difference of two feature maps: what vid_nll is at a fixed variance, without the constant.

    prediction, target: [B, C, H, W], any floating dtype.  factor, impl, errors: as in vid_nll.
    Returns a scalar, fp32 (fp64 for fp64 input).
    """
    checks.maps("mean_squared_error", prediction=prediction, target=target)
    checks.shape("mean_squared_error", "target", target, tuple(prediction.shape))
    checks.numbers("mean_squared_error", factor=factor)
    if checks.choose("mean_squared_error", impl, prediction=prediction, target=target) == "triton":
        checks.channels_last("mean_squared_error", prediction=prediction, target=target)
        return _vid_nll(prediction, target, None, 0.0, factor, one_pass(prediction))[0]
    return factor * reference.mean_squared_error(*checks.upcast(prediction, target))
