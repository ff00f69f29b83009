"""The distillation losses as functions of tensors, usable without the rest of fastvid: see README.md here."""

from fastvid.kernels import checks, reference
from fastvid.kernels.attention import attention_transfer
from fastvid.kernels.kd import softened_kl
from fastvid.kernels.projected_vid import projected_vid_nll
from fastvid.kernels.vid import mean_squared_error, vid_nll

__all__ = [
    "attention_transfer",
    "checks",
    "mean_squared_error",
    "projected_vid_nll",
    "reference",
    "softened_kl",
    "vid_nll",
]
