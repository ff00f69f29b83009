"""The last 1x1 convolution of a VID regressor and its negative log-likelihood, in one kernel.

    mean = weight · hidden + bias      loss = vid_nll(mean, target, raw_scale)      d = ∂loss/∂mean (vid.py)
    ∂loss/∂hidden = weightᵀ · d        ∂loss/∂weight = Σ_m d · hiddenᵀ              ∂loss/∂bias = Σ_m d

M = B·H·W rows, C channels of the target, K of the hidden map. A tile of the mean exists in registers only.
With K = 2C, one pass moves (2K + C)·M·itemsize bytes, 5 maps of C channels; convolution, loss and their
backward move 12, or 9 with vid_nll. In fp16, forward moves 3 and backward 5. The L2 cache holds the partial
sums of the weight's gradient, and the tiles that two programs share at 128 channels.

The kernel takes 16-bit maps of up to 128 channels with K = C or K = 2C, rounded up to powers of two. All else
is a convolution and vid_nll: in fp32 a kernel would have to choose between the tensor cores and the user's
TF32 setting, and a wider weight does not fit into registers beside its gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastvid.kernels import checks
from fastvid.kernels.one_pass import begin_backward, one_pass, operator
from fastvid.kernels.triton_support import dense, jit, launch, tl, triton
from fastvid.kernels.vid import launch_finish, per_element, variance_of, vid_nll
from torch import Tensor

# How a projection is cut, by (C, K), each rounded up to a power of two. SLICE: hidden channels of a program,
# which computes the mean from all of them but the gradients only of its own. programs: a limit, two to four
# on each multiprocessor of an H100. The accumulators (mean, gradients of hidden and weight) stay in registers
# on sm_80, sm_90, sm_100 and sm_120, the tiles within 100 KB of shared memory. The last two cuts need the
# larger shared memory of sm_90 and sm_100; elsewhere they would spill registers.
_CUTS = {
    (16, 16): {"programs": 512, "BLOCK_ROWS": 64, "SLICE": 16, "num_warps": 4, "num_stages": 2},
    (16, 32): {"programs": 512, "BLOCK_ROWS": 64, "SLICE": 32, "num_warps": 4, "num_stages": 2},
    (32, 32): {"programs": 512, "BLOCK_ROWS": 64, "SLICE": 32, "num_warps": 4, "num_stages": 1},
    (32, 64): {"programs": 512, "BLOCK_ROWS": 64, "SLICE": 64, "num_warps": 4, "num_stages": 2},
    (64, 64): {"programs": 128, "BLOCK_ROWS": 64, "SLICE": 64, "num_warps": 8, "num_stages": 1},
    (64, 128): {"programs": 128, "BLOCK_ROWS": 64, "SLICE": 128, "num_warps": 8, "num_stages": 2},
    (128, 128): {"programs": 64, "BLOCK_ROWS": 32, "SLICE": 64, "num_warps": 8, "num_stages": 2},
    (128, 256): {"programs": 64, "BLOCK_ROWS": 32, "SLICE": 128, "num_warps": 8, "num_stages": 2},
}


def _blocks(channels: int, hidden: int) -> tuple[int, int]:
    """Both widths as the dots take them; an operand of a tensor core has at least 16 rows and columns."""
    return tuple(max(16, 1 << (width - 1).bit_length()) for width in (channels, hidden))


def _fits(hidden: Tensor, weight: Tensor, target: Tensor) -> bool:
    """Whether the kernel takes it: 16-bit, not empty, a width of the table, and no gradient of the target."""
    blocks, capability = _blocks(*weight.shape[:2]), _capability(hidden)
    half, empty = hidden.dtype in (torch.bfloat16, torch.float16), not target.numel()
    wide = capability in (9, 10) if blocks[0] == 128 else capability >= 8
    return half and not empty and blocks in _CUTS and wide and not target.requires_grad


def _capability(tensor: Tensor) -> int:
    """Major compute capability of the tensor's GPU. The interpreter has no limits and counts as Hopper."""
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
    """One program reads `tiles` tiles of rows and owns one slice of the hidden channels. It computes the
    whole mean, in fp32 from 16-bit operands, and never rounds it to 16 bits."""
    SLICES: tl.constexpr = BLOCK_HIDDEN // SLICE
    program, own = tl.program_id(0), tl.program_id(1)
    offs_c = tl.arange(0, BLOCK_CHANNELS)
    mask_c = offs_c < CHANNELS
    offs_k = own * SLICE + tl.arange(0, SLICE)
    first = program.to(tl.int64) * tiles * BLOCK_ROWS  # within one program, int32 is enough
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
            other_weight = _slice(weight_ptr, offs_c, mask_c, offs_other, HIDDEN).to(other.dtype)
            mean = tl.dot(other, tl.trans(other_weight), mean)
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
            mask = mask_m[:, None] & (offs_k < HIDDEN)[None, :]
            tl.store(hidden_gradient_ptr + first * HIDDEN + offs, tl.dot(gradient, weight), mask=mask)
            weight_gradient = tl.dot(tl.trans(gradient), hidden, weight_gradient)
    if square_ptr is not None:
        if own == 0:
            tl.store(square_ptr + program * CHANNELS + offs_c, squares, mask=mask_c)
            tl.store(residual_ptr + program * CHANNELS + offs_c, residuals, mask=mask_c)
    if hidden_gradient_ptr is not None:
        weight_partial_ptr += program * CHANNELS * HIDDEN
        offs = offs_c[:, None] * HIDDEN + offs_k[None, :]
        mask = mask_c[:, None] & (offs_k < HIDDEN)[None, :]
        tl.store(weight_partial_ptr + offs, weight_gradient, mask=mask)


@jit
def _slice(pointer, offs_rows, mask_rows, offs_columns, COLUMNS: tl.constexpr):
    """A tile of a row-major matrix with COLUMNS columns; zero beyond the edges of the matrix."""
    mask = mask_rows[:, None] & (offs_columns < COLUMNS)[None, :]
    return tl.load(pointer + offs_rows[:, None] * COLUMNS + offs_columns[None, :], mask=mask, other=0.0)


def _pass(
    hidden, weight, bias, target, raw_scale, eps, factor, with_gradient, upstream, loss, gradient, parameters
):
    (channels, width), rows = weight.shape[:2], target.numel() // target.shape[1]
    raw_scale, inverse_count = dense(raw_scale), per_element(target, factor)
    block_channels, block_hidden = _blocks(channels, width)
    cut = dict(_CUTS[block_channels, block_hidden])
    tiles = triton.cdiv(rows, cut["BLOCK_ROWS"])
    tiles_each = triton.cdiv(tiles, cut.pop("programs"))
    programs = triton.cdiv(tiles, tiles_each)
    sums = parameters.new_empty(2, programs, channels) if upstream is None else (None, None)
    weight_partial = parameters.new_empty(programs, channels, width) if with_gradient else None
    tensors = (hidden, dense(weight), dense(bias), target, raw_scale, upstream)
    results = (*sums, gradient if with_gradient else None, weight_partial)
    grid = (programs, block_hidden // cut["SLICE"] if with_gradient else 1)
    cut |= {"CHANNELS": channels, "HIDDEN": width}
    cut |= {"BLOCK_CHANNELS": block_channels, "BLOCK_HIDDEN": block_hidden}
    launch(_projection_kernel, grid, *tensors, *results, rows, tiles_each, eps, inverse_count, **cut)
    if upstream is not None:
        return loss, gradient, weight_partial.sum(0).view(-1)
    loss = launch_finish((*sums, weight_partial), raw_scale, parameters, eps, factor, inverse_count)
    return loss, gradient, parameters


def _backward(ctx, upstream, *_):
    inputs, hidden_gradient, parameters = begin_backward("projected_vid_nll", ctx, upstream)
    _, weight, bias, _, raw_scale, *_ = inputs
    channels, needs = weight.shape[0], ctx.needs_input_grad
    weight_gradient, rest = parameters[: -2 * channels], parameters[-2 * channels :]
    if hidden_gradient is None and (needs[0] or needs[1]):
        _, hidden_gradient, weight_gradient = _projected_vid_nll(*inputs[:-2], True, upstream)
    weight_gradient = _like(weight_gradient.to(weight.dtype), weight) if needs[1] else None
    bias_gradient = rest[channels:].to(bias.dtype) if needs[2] else None
    scale_gradient = rest[:channels].to(raw_scale.dtype) if needs[4] else None
    hidden_gradient = hidden_gradient if needs[0] else None
    return hidden_gradient, weight_gradient, bias_gradient, None, scale_gradient, None, None, None, None


def _like(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient [C·K] in the shape of the weight and, for DDP, in its strides if the weight is dense."""
    channels, width = weight.shape[:2]
    if weight.stride() == (width, 1, width, width):
        # This view starts at the row's first element, because Inductor of torch 2.11 loses an offset.
        return gradient.view(channels, 1, 1, width).permute(0, 3, 1, 2)
    return gradient.view(weight.shape)


def _parameters(hidden, weight, bias, target, raw_scale, eps, factor, with_gradient, upstream) -> int:
    """The gradients of weight (with_gradient), raw_scale and bias (both without upstream), in this order."""
    return (weight.numel() if with_gradient else 0) + (2 * len(weight) if upstream is None else 0)


_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor raw_scale, float eps, float factor"
)
_projected_vid_nll = operator("projected_vid_nll_pass", _SCHEMA, _pass, _backward, _parameters)


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
    """vid_nll whose mean is a 1x1 convolution of `hidden`, such as the last layer of a regressor.

    hidden: [B, K, H, W].  weight: [C, K, 1, 1].  bias: [C] or None.  target: [B, C, H, W].  raw_scale: [C].
    The convolution runs in the dtype of autocast or of `hidden`, the loss in fp32.  factor, impl, result and
    errors: as in vid_nll.  In Triton this is one kernel for 16-bit maps of up to 128 channels with K = C or K
    = 2C and a target that needs no gradient; otherwise it is PyTorch's convolution and the kernel of vid_nll.
    """
    op = "projected_vid_nll"
    checks.maps(op, hidden=hidden, target=target)
    checks.shape(op, "weight", weight, (target.shape[1], hidden.shape[1], 1, 1))
    checks.shape(op, "raw_scale", raw_scale, (target.shape[1],))
    if bias is not None:
        checks.shape(op, "bias", bias, (target.shape[1],))
    checks.numbers(op, eps=eps, factor=factor)
    parameters = {"weight": weight, "bias": bias, "raw_scale": raw_scale}
    chosen = checks.choose(op, impl, {"hidden": hidden, "target": target}, **parameters)
    if chosen == "triton" and _fits(hidden, weight, target):
        inputs = (hidden, weight, bias, target, raw_scale, eps, factor)
        return _projected_vid_nll(*inputs, one_pass(hidden), None)[0]
    mean = F.conv2d(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    if chosen == "triton":  # a map of one channel may be taken for NCHW: no copy, only other strides
        mean = mean.contiguous(memory_format=torch.channels_last)
    return vid_nll(mean, target, raw_scale, eps=eps, factor=factor, impl=impl)
