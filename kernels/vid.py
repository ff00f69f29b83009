"""Gaussian negative log-likelihood of a teacher feature map (VID).

    loss = 1/(M·C) · Σ_c ½ [ S_c / v_c + M·log v_c ],   S_c = Σ_m (target - mean)²,   v = softplus(raw_scale) + eps

M = B·H·W rows, C channels. The constant ½·log 2π is left out.
"""
import torch.nn.functional as F
from fastvid.kernels import checks, reference
from torch import Tensor


def vid_nll(mean: Tensor, target: Tensor, raw_scale: Tensor, *, eps: float = 1e-5, impl: str = "auto") -> Tensor:
    """Negative log-likelihood of `target` under a Gaussian with one learned variance per channel, averaged over elements.

    mean, target: [B, C, H, W], any floating dtype.  raw_scale: [C]; the variance is softplus(raw_scale) + eps.
    Returns a scalar, fp32 (fp64 for fp64 input).  impl: auto or reference.
    Raises ValueError on shapes that do not fit.  Source: Ahn et al., CVPR 2019.
    """
    checks.choose("vid_nll", impl)
    checks.maps("vid_nll", mean=mean, target=target)
    checks.shape("vid_nll", "target", target, tuple(mean.shape))
    checks.shape("vid_nll", "raw_scale", raw_scale, (mean.shape[1],))
    return reference.vid_nll(*checks.upcast(mean, target, raw_scale), eps=eps)


def projected_vid_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, raw_scale: Tensor, *,
                      eps: float = 1e-5, impl: str = "auto") -> Tensor:
    """vid_nll whose mean is a 1x1 convolution of `hidden`, as the last layer of a regressor is.

    hidden: [B, K, H, W].  weight: [C, K, 1, 1].  bias: [C] or None.  target: [B, C, H, W].  raw_scale: [C].
    The convolution runs in the dtype of autocast or of `hidden`, the loss in fp32. Returns and raises as vid_nll.
    """
    checks.choose("projected_vid_nll", impl)
    checks.maps("projected_vid_nll", hidden=hidden, target=target)
    checks.shape("projected_vid_nll", "weight", weight, (target.shape[1], hidden.shape[1], 1, 1))
    checks.shape("projected_vid_nll", "raw_scale", raw_scale, (target.shape[1],))
    if bias is not None:
        checks.shape("projected_vid_nll", "bias", bias, (target.shape[1],))
        bias = bias.to(hidden.dtype)
    return vid_nll(F.conv2d(hidden, weight.to(hidden.dtype), bias), target, raw_scale, eps=eps, impl=impl)
