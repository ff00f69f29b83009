"""Attention transfer: the distance of two normalised maps of where a network looks.

    loss = 1/(B·H·W) · Σ (Q(student) - Q(teacher))²,   Q(x) = A / ‖A‖₂ over H·W,   A = mean over channels of x²
"""
from fastvid.kernels import checks, reference
from torch import Tensor


def attention_transfer(student: Tensor, teacher: Tensor, *, impl: str = "auto") -> Tensor:
    """Mean squared difference of two attention maps, over images and positions.

    student: [B, Cs, H, W], teacher: [B, Ct, H, W], any floating dtype; the channel counts may differ.
    Returns a scalar, fp32 (fp64 for fp64 input).  impl: auto or reference.
    Raises ValueError on shapes that do not fit.  Source: Zagoruyko and Komodakis, ICLR 2017.
    """
    checks.choose("attention_transfer", impl)
    checks.maps("attention_transfer", student=student, teacher=teacher)
    return reference.attention_transfer(*checks.upcast(student, teacher))
