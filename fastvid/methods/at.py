"""Attention transfer (AT; Zagoruyko and Komodakis, ICLR 2017): CE + β·Σ over groups 1, 2, 3 of the AT loss.

The attention maps are those of the residual sums at the end of each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

from torch import Tensor, nn

from fastvid.config import ATOptions
from fastvid.kernels import attention_transfer, checks
from fastvid.methods.base import Transfer
from fastvid.wresnet import TAPS, Activations, WideResNet


class ATLoss(nn.Module):
    """Sum over pairs of maps [B, C, H, W] of the mean squared difference of their attention maps.

    The two maps of a pair may differ in C.  factor, impl: as in fastvid.kernels.attention_transfer.
    """

    def __init__(self, *, factor: float = 1.0, impl: str = "auto"):
        super().__init__()
        checks.implementation("ATLoss", impl)
        self.factor, self.impl = factor, impl

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        return reduce(add, self.per_tap(student_maps, teacher_maps))

    def per_tap(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> list[Tensor]:
        """The loss of each pair, fp32 scalars."""
        checks.pairs("ATLoss", student_maps=student_maps, teacher_maps=teacher_maps)
        return [
            attention_transfer(student, teacher, factor=self.factor, impl=self.impl)
            for student, teacher in zip(student_maps, teacher_maps)
        ]


class AttentionTransfer(Transfer):
    """β · ATLoss of groups 1, 2, 3."""

    title, colour = "AT", "#E69F00"

    def __init__(self, options: ATOptions, student: WideResNet, teacher: WideResNet):
        super().__init__()
        self.loss = ATLoss(factor=options.weight)

    def forward(self, student: Activations, teacher: Activations) -> dict[str, Tensor]:
        return dict(zip(TAPS[1:], self.loss.per_tap(student.stages[1:], teacher.stages[1:])))
