"""Gaussian negative log-likelihood of a teacher feature map (VID), fused. M = B·H·W rows, C channels.

    loss = factor/(M·C) · Σ_c ½ [ S_c / v_c + M·log v_c ],   S_c = Σ_m (mean - target)²
    v = softplus(raw_scale) + eps;   the constant ½·log 2π is left out
    ∂loss/∂mean = factor/(M·C) · (mean - target) / v
    ∂loss/∂raw_scale = factor/(2C) · sigmoid(raw_scale) · (1 - S/(M·v)) / v

S_c is the only sum over M, so one pass reads both maps and writes the gradient: 3·M·C·itemsize bytes, or 2
without a gradient. In fp16, forward moves 2 maps and backward 3. A gradient of the target is one more pass.
`mean_squared_error` is in this file because it runs the same kernels: v = ½ everywhere, and no logarithm.
"""

from __future__ import annotations

from fastvid.kernels import checks, reference
from fastvid.kernels.one_pass import begin_backward, one_pass, operator
from fastvid.kernels.triton_support import dense, jit, launch, tl, triton
from torch import Tensor

_TILE = 4096  # elements of a tile: with 4 warps, four 16-byte loads of both bf16 maps in flight a thread
_WIDEST = 128  # channels of a tile: a row of 256 bytes in bf16 is two full cache lines
# Four programs on each of the 132 multiprocessors of an H100 read the map in one round and leave few partial
# sums. It is a constant because the bits of a sum depend on how the sum is cut.
_PROGRAMS = 512
_FINISH_TILE = 8192  # 16 warps with 16 values a thread in flight: the loads of 1 to 4 rounds
_BLOCK_WEIGHTS = 64  # weights of a finishing program: 256-byte rows, all read in one round


@jit
def _softplus(x):
    """log(1 + exp(x)) as PyTorch computes it: x itself above 20. Triton has no log1p, hence the quotient."""
    u = tl.exp(tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL))
    w = 1.0 + u
    return tl.where(x > 20.0, x, tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0))))


@jit
def variance_of(raw_scale_ptr, offs_c, mask_c, eps):
    """The variance of each channel: ½ if there is no raw_scale, and 1 beyond the last channel."""
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
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program reads `tiles` tiles of rows, sums (mean - target)² over the rows and writes their gradient.
    The maps are upcast first: in fp16, 256² overflows. No atomics, so equal inputs give equal bits."""
    offs_c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask_c = offs_c < CHANNELS
    first = tl.program_id(0).to(tl.int64) * tiles * BLOCK_ROWS  # within one program, int32 is enough
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
def sum_rows(matrix_ptr, rows, offs_c, mask_c, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Sum over the rows of a matrix [rows, COLUMNS] in fp32, in an order that depends only on the shape."""
    BLOCK_ROWS: tl.constexpr = TILE // offs_c.shape[0]
    sums = tl.zeros([BLOCK_ROWS, offs_c.shape[0]], tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        offs_m = first + tl.arange(0, BLOCK_ROWS)
        mask = (offs_m < rows)[:, None] & mask_c[None, :]
        sums += tl.load(matrix_ptr + offs_m[:, None] * COLUMNS + offs_c[None, :], mask=mask, other=0.0)
    return tl.sum(sums, axis=0)


@jit
def finish_kernel(
    square_ptr,  # [programs, C] fp32 partial sums of the squared residuals
    residual_ptr,  # [programs, C] fp32 partial sums of the residuals, or None: no gradient of a bias
    weight_partial_ptr,  # [programs, WEIGHTS] fp32 partial sums of a weight's gradient, or None
    raw_scale_ptr,  # [C], or None: mean squared error
    loss_ptr,  # [blocks of channels] fp32, the share of each block
    parameters_ptr,  # fp32 gradients: weight [WEIGHTS], raw_scale [C], bias [C], as far as they are asked for
    programs,
    eps,
    factor,
    inverse_count,
    CHANNELS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_WEIGHTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program finishes a block of channels (loss, raw_scale, bias) or of the weight's gradient."""
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    block = tl.program_id(0)
    if block < CHANNEL_BLOCKS:
        offs_c = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        mask_c = offs_c < CHANNELS
        variance = variance_of(raw_scale_ptr, offs_c, mask_c, eps)
        quotient = sum_rows(square_ptr, programs, offs_c, mask_c, CHANNELS, TILE) * inverse_count / variance
        if raw_scale_ptr is None:
            tl.store(loss_ptr + block, 0.5 * tl.sum(quotient))
        else:
            share = factor / CHANNELS
            terms = tl.where(mask_c, quotient + share * tl.log(variance), 0.0)
            tl.store(loss_ptr + block, 0.5 * tl.sum(terms))
            raw = tl.load(raw_scale_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
            slope = 0.5 * tl.sigmoid(raw) * (share - quotient) / variance
            tl.store(parameters_ptr + WEIGHTS + offs_c, slope, mask=mask_c)
        if residual_ptr is not None:
            residuals = sum_rows(residual_ptr, programs, offs_c, mask_c, CHANNELS, TILE)
            slope = residuals * inverse_count / variance
            tl.store(parameters_ptr + WEIGHTS + CHANNELS + offs_c, slope, mask=mask_c)
    elif weight_partial_ptr is not None:
        offs_w = (block - CHANNEL_BLOCKS) * BLOCK_WEIGHTS + tl.arange(0, BLOCK_WEIGHTS)
        mask_w = offs_w < WEIGHTS
        sums = sum_rows(weight_partial_ptr, programs, offs_w, mask_w, WEIGHTS, TILE)
        tl.store(parameters_ptr + offs_w, sums, mask=mask_w)


def launch_finish(sums, raw_scale, parameters, eps, factor, inverse_count) -> Tensor:
    """Return the loss, and write the gradients of the parameters, from the partial sums of a pass: of squares
    [programs, C], of residuals [programs, C] or None, and of a weight's gradient [programs, C, K] or None."""
    (programs, channels), weight_partial = sums[0].shape, sums[2]
    weights = 0 if weight_partial is None else weight_partial[0].numel()
    block_channels = min(triton.next_power_of_2(channels), _WIDEST)
    blocks = triton.cdiv(channels, block_channels)
    shares, grid = parameters.new_empty(blocks), (blocks + triton.cdiv(weights, _BLOCK_WEIGHTS),)
    cut = {"CHANNELS": channels, "WEIGHTS": weights, "BLOCK_CHANNELS": block_channels}
    cut |= {"BLOCK_WEIGHTS": _BLOCK_WEIGHTS, "TILE": _FINISH_TILE, "num_warps": 16}
    tensors, numbers = (*sums, raw_scale, shares, parameters), (programs, eps, factor, inverse_count)
    launch(finish_kernel, grid, *tensors, *numbers, **cut)
    return shares.sum() if blocks > 1 else shares.view(())


def per_element(target: Tensor, factor: float) -> float:
    """factor/(M·C), or NaN for an empty batch, whose loss is 0/0."""
    return factor / target.numel() if target.numel() else float("nan")


def _cut(rows: int, channels: int) -> tuple[int, int, int, dict]:
    """The grid (programs, blocks of channels), the tiles of each program, and the constants of the kernel."""
    block_channels = min(triton.next_power_of_2(channels), _WIDEST)
    block_rows = _TILE // block_channels
    tiles, blocks = triton.cdiv(max(rows, 1), block_rows), triton.cdiv(channels, block_channels)
    most = max(1, 2**31 // (block_rows * channels))  # the offsets within a program must fit into int32
    tiles_each = min(triton.cdiv(tiles, max(1, _PROGRAMS // blocks)), most)
    cut = {"CHANNELS": channels, "BLOCK_CHANNELS": block_channels, "BLOCK_ROWS": block_rows, "num_warps": 4}
    return triton.cdiv(tiles, tiles_each), blocks, tiles_each, cut


def _pass(mean, target, raw_scale, eps, factor, with_gradient, upstream, loss, gradient, parameters):
    raw_scale, inverse_count = dense(raw_scale), per_element(mean, factor)
    channels, rows = mean.shape[1], mean.numel() // mean.shape[1]
    programs, blocks, tiles, cut = _cut(rows, channels)
    partial = parameters.new_empty(programs, channels) if upstream is None else None
    tensors = (mean, target, raw_scale, upstream, partial, gradient if with_gradient else None)
    launch(_residual_kernel, (programs, blocks), *tensors, rows, tiles, eps, inverse_count, **cut)
    if upstream is None:
        loss = launch_finish((partial, None, None), raw_scale, parameters, eps, factor, inverse_count)
    return loss, gradient, parameters


def _backward(ctx, upstream, *_):
    inputs, gradient, scale_gradient = begin_backward("vid_nll or mean_squared_error", ctx, upstream)
    (mean, target, *rest, _, _), needs, target_gradient = inputs, ctx.needs_input_grad, None
    if gradient is None and needs[0]:
        gradient = _vid_nll(mean, target, *rest, True, upstream)[1]
    if needs[1]:
        target_gradient = _vid_nll(target, mean, *rest, True, upstream)[1]
    scale_gradient = scale_gradient.to(rest[0].dtype) if needs[2] else None
    return gradient, target_gradient, scale_gradient, None, None, None, None


def _parameters(mean, target, raw_scale, eps, factor, with_gradient, upstream) -> int:
    return 0 if raw_scale is None or upstream is not None else len(raw_scale)


_SCHEMA = "Tensor mean, Tensor target, Tensor? raw_scale, float eps, float factor"
_vid_nll = operator("vid_nll_pass", _SCHEMA, _pass, _backward, _parameters)


def vid_nll(
    mean: Tensor,
    target: Tensor,
    raw_scale: Tensor,
    *,
    eps: float = 1e-5,
    factor: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Negative log-likelihood of `target`: a Gaussian, one variance per channel (Ahn et al., CVPR 2019).

    mean, target: [B, C, H, W], any floating dtype.  raw_scale: [C]; variance = softplus(raw_scale) + eps.
    factor: multiplies the loss; cheaper than to multiply outside, because backward need not touch the map.
    impl: "auto" (Triton for CUDA tensors, the reference for CPU tensors), "triton" or "reference".
    Triton needs channels-last maps in fp32, bf16 or fp16 and has first derivatives only.
    Returns a scalar, fp32 (fp64 for fp64 input).  Raises ValueError on unsuitable shapes, dtypes or layouts.
    """
    op, maps = "vid_nll", {"mean": mean, "target": target}
    checks.maps(op, **maps)
    checks.shape(op, "target", target, tuple(mean.shape))
    checks.shape(op, "raw_scale", raw_scale, (mean.shape[1],))
    checks.numbers(op, eps=eps, factor=factor)
    if checks.choose(op, impl, maps, raw_scale=raw_scale) == "triton":
        return _vid_nll(mean, target, raw_scale, eps, factor, one_pass(mean), None)[0]
    return factor * reference.vid_nll(*checks.upcast(mean, target, raw_scale), eps=eps)


def mean_squared_error(
    prediction: Tensor, target: Tensor, *, factor: float = 1.0, impl: str = "auto"
) -> Tensor:
    """Mean squared difference of two maps [B, C, H, W].  factor, impl, result and errors: as in vid_nll."""
    op, maps = "mean_squared_error", {"prediction": prediction, "target": target}
    checks.maps(op, **maps)
    checks.shape(op, "target", target, tuple(prediction.shape))
    checks.numbers(op, factor=factor)
    if checks.choose(op, impl, maps) == "triton":
        return _vid_nll(prediction, target, None, 0.0, factor, one_pass(prediction), None)[0]
    return factor * reference.mean_squared_error(*checks.upcast(prediction, target))
