"""FitNet (Romero et al., ICLR 2015): regressors predict maps of the teacher (hints) from maps of the student.

Joint schedule, as in RepDistiller: CE + weight·Σ over taps of MSE.
Two-stage schedule, as in the paper: first the hints alone, while the layers above them are frozen; then
everything but the hints (CE, and with kd+fitnet the softened logits). Both stages share one learning-rate
schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

from torch import Tensor, nn

from fastvid.config import FitNetOptions
from fastvid.kernels import checks, mean_squared_error
from fastvid.methods.base import Transfer, as_taps, clip_to_weights, in_layout_of
from fastvid.wresnet import TAPS, Activations, WideResNet


class FitNetLoss(nn.Module):
    """Sum over taps of the mean squared error between a teacher map and its regression from a student map.

    A regressor is a 1x1 convolution, batch norm and ReLU. Give teacher maps after a ReLU, because the
    regressor cannot predict negative values.
    student_channels, teacher_channels: one number per tap, or one number each for a single pair of maps. Maps
    are [B, C, H, W], and the two maps of a pair agree in B, H and W.
    factor, impl: as in fastvid.kernels.mean_squared_error.
    Returns a scalar, fp32.  Raises ValueError if shapes do not fit.
    """

    def __init__(
        self,
        student_channels: Sequence[int] | int,
        teacher_channels: Sequence[int] | int,
        *,
        factor: float = 1.0,
        impl: str = "auto",
    ):
        super().__init__()
        student_channels, teacher_channels = as_taps(student_channels), as_taps(teacher_channels)
        checks.implementation("FitNetLoss", impl)
        checks.pairs("FitNetLoss", student_channels=student_channels, teacher_channels=teacher_channels)
        self.factor, self.impl = factor, impl
        self.regressors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(s, t, 1, bias=False), nn.BatchNorm2d(t), nn.ReLU(inplace=True))
            for s, t in zip(student_channels, teacher_channels)
        )

    def forward(
        self, student_maps: Sequence[Tensor] | Tensor, teacher_maps: Sequence[Tensor] | Tensor
    ) -> Tensor:
        return reduce(add, self.per_tap(student_maps, teacher_maps))

    def per_tap(
        self, student_maps: Sequence[Tensor] | Tensor, teacher_maps: Sequence[Tensor] | Tensor
    ) -> list[Tensor]:
        """The loss of each tap, fp32 scalars."""
        student_maps, teacher_maps = as_taps(student_maps), as_taps(teacher_maps)
        count = len(self.regressors)
        checks.pairs("FitNetLoss", count=count, student_maps=student_maps, teacher_maps=teacher_maps)
        losses = []
        for index, regressor in enumerate(self.regressors):
            student_map, target = student_maps[index], teacher_maps[index]
            maps = {
                f"student_maps[{index}]": (student_map, regressor[0].in_channels),
                f"teacher_maps[{index}]": (target, regressor[0].out_channels),
            }
            checks.tap("FitNetLoss", self.impl, **maps)
            prediction = in_layout_of(student_map, regressor(student_map))
            losses.append(mean_squared_error(prediction, target, factor=self.factor, impl=self.impl))
        return losses

    def clip_gradients(self) -> None:
        """Call clip_to_weights on the regressors. Use this between backward() and step()."""
        clip_to_weights(self.regressors)

    def predictions(self, student_maps: Sequence[Tensor]) -> list[Tensor]:
        """Predictions of the teacher maps from the student's maps."""
        return [regressor(student_map) for regressor, student_map in zip(self.regressors, student_maps)]


class Hint(Transfer):
    """weight · FitNetLoss at the taps of the options."""

    title, colour = "FitNet", "#009E73"
    has_regressors = True

    def __init__(self, options: FitNetOptions, student: WideResNet, teacher: WideResNet):
        super().__init__()
        self._names = TAPS if options.tap == ("all",) else options.tap
        self._taps = [TAPS.index(tap) for tap in self._names]
        self.loss = FitNetLoss(
            [student.tap_channels[tap] for tap in self._taps],
            [teacher.tap_channels[tap] for tap in self._taps],
            factor=options.weight,
        )
        self._options = options

    def forward(self, student: Activations, teacher: Activations) -> dict[str, Tensor]:
        return dict(zip(self._names, self.loss.per_tap(*self._maps(student, teacher))))

    def predictions(self, student: Activations, teacher: Activations) -> dict[str, tuple[Tensor, Tensor]]:
        student_maps, teacher_maps = self._maps(student, teacher)
        return dict(zip(self._names, zip(self.loss.predictions(student_maps), teacher_maps)))

    def _maps(self, student: Activations, teacher: Activations) -> tuple[list[Tensor], list[Tensor]]:
        return [student.activated[tap] for tap in self._taps], [teacher.activated[tap] for tap in self._taps]

    def begin_epoch(self, progress: float) -> None:
        if self._options.schedule == "two-stage":
            self.alone = progress < self._options.hint_share
            self.over = not self.alone
