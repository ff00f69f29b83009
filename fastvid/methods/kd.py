"""Knowledge distillation (Hinton et al. 2015): (1 - α)·CE + α·T²·KL of the softened logits."""

from __future__ import annotations

from torch import Tensor, nn

from fastvid.config import KDOptions
from fastvid.kernels import checks, softened_kl
from fastvid.methods.base import Transfer
from fastvid.wresnet import Activations, WideResNet


class KDLoss(nn.Module):
    """T² · KL(teacher ‖ student) of logits [B, classes] at temperature T, averaged over the batch.

    factor, impl: as in fastvid.kernels.softened_kl.
    """

    def __init__(
        self, temperature: float = KDOptions.temperature, *, factor: float = 1.0, impl: str = "auto"
    ):
        super().__init__()
        checks.implementation("KDLoss", impl)
        self.temperature, self.factor, self.impl = temperature, factor, impl

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return softened_kl(
            student_logits, teacher_logits, temperature=self.temperature, factor=self.factor, impl=self.impl
        )


class SoftenedLogits(Transfer):
    """α · KDLoss; the cross entropy has weight 1 - α."""

    title, colour = "KD", "#56B4E9"

    def __init__(self, options: KDOptions, student: WideResNet, teacher: WideResNet):
        super().__init__()
        self.loss, self.task_weight = KDLoss(options.temperature, factor=options.alpha), 1 - options.alpha

    def forward(self, student: Activations, teacher: Activations) -> dict[str, Tensor]:
        return {"logits": self.loss(student.logits, teacher.logits)}
