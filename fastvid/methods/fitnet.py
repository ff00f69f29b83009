"""FitNet (Romero et al., ICLR 2015): the student's map, through a regressor, shall equal the teacher's hint.

Joint, as RepDistiller trains it: CE + weight·MSE. Two-stage, as the paper does: the hint alone first, while the layers above it
stand still, then everything but the hint (CE, or with kd+fitnet the softened logits too), in one learning-rate schedule.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastvid.config import FitNetOptions
from fastvid.kernels import checks, mean_squared_error
from fastvid.methods.base import Transfer, in_layout_of
from fastvid.wresnet import TAPS, Activations, WideResNet


class FitNetLoss(nn.Module):
    """Mean squared error between a teacher map and a 1x1 convolution with batch norm and ReLU of the student map.

    student_channels, teacher_channels: of maps [B, C, H, W] that agree in B, H and W. The teacher map is one after a ReLU:
    a regressor that ends in a ReLU cannot reach negative values. Returns a scalar, fp32.
    factor, impl: as in fastvid.kernels.vid_nll.  Raises ValueError on shapes that do not fit.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, *, factor: float = 1.0, impl: str = "auto"
    ):
        super().__init__()
        checks.implementation("FitNetLoss", impl)
        self.factor, self.impl = factor, impl
        self.regressor = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.BatchNorm2d(teacher_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        convolution = self.regressor[0]
        checks.tap(
            "FitNetLoss",
            self.impl,
            student_map=(student_map, convolution.in_channels),
            teacher_map=(teacher_map, convolution.out_channels),
        )
        prediction = in_layout_of(student_map, self.regressor(student_map))
        return mean_squared_error(prediction, teacher_map, factor=self.factor, impl=self.impl)


class Hint(Transfer):
    """weight · FitNetLoss at one tap."""

    def __init__(self, options: FitNetOptions, student: WideResNet, teacher: WideResNet):
        super().__init__()
        self.tap = TAPS.index(options.tap)
        self.loss = FitNetLoss(
            student.tap_channels[self.tap], teacher.tap_channels[self.tap], factor=options.weight
        )
        self.options = options
        self.staged = options.schedule == "two-stage"

    def forward(self, student: Activations, teacher: Activations) -> dict[str, Tensor]:
        return {TAPS[self.tap]: self.loss(student.activated[self.tap], teacher.activated[self.tap])}

    def begin_epoch(self, progress: float) -> None:
        if self.staged:
            self.alone = progress < self.options.hint_share
            self.over = not self.alone
