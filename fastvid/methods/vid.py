"""Variational information distillation (Ahn et al., CVPR 2019): CE + λ·Σ over taps of -log q(teacher map | student map).

q is a Gaussian; a regressor of the student map gives its mean, and one learned variance per channel its spread, so that
channels which the student cannot predict weigh less.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.config import VIDOptions
from fastvid.kernels import checks, projected_vid_nll
from fastvid.methods.base import Transfer, in_layout_of
from fastvid.wresnet import TAPS, Activations, WideResNet


@dataclass(frozen=True)
class Variant:
    """Everything in which published versions of VID differ."""

    taps: tuple[str, ...]
    """which maps are matched"""
    activated: bool
    """the maps after batch norm and ReLU, or the residual sums before"""
    hidden_multiples: tuple[int, ...]
    """channels of the regressor's hidden layers, in multiples of the teacher's channels"""
    batch_norm: bool
    """batch norm after the hidden convolutions, and a bias in the last"""
    eps: float
    """least variance"""
    initial_variance: float
    """of every channel"""
    decayed_scale: bool
    """weight decay on the variance parameters too"""


VARIANTS = {
    # Not known to us from the paper, and so our choice: the exact place of the taps, eps, the first variances, no decay on them. Of
    # variances that start at 5, 1 or 0.3 the last gave most on held-out training images: the others fall too late (bench/results).
    "paper": Variant(TAPS, activated=True, hidden_multiples=(2, 2), batch_norm=True, eps=1e-5, initial_variance=0.3,
                     decayed_scale=False),
    # RepDistiller's, from the authors' code.
    "repdistiller": Variant(TAPS[1:], activated=False, hidden_multiples=(1, 1), batch_norm=False, eps=1e-5, initial_variance=5.0,
                            decayed_scale=True),
}


class VIDLoss(nn.Module):
    """Sum over taps of the negative log-likelihood of teacher maps given student maps; holds regressors and variances.

    student_channels, teacher_channels: one number per tap, of maps [B, C, H, W] that agree in B, H and W.
    variant: a key of VARIANTS, for the regressor, eps and initial variance.
    factor, impl: as in fastvid.kernels.projected_vid_nll, which says what runs in one kernel.
    Returns a scalar, fp32.
    Optimise its parameters together with the student's.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], *, variant: str = VIDOptions.variant,
                 factor: float = 1.0, impl: str = "auto"):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"VIDLoss has no variant {variant!r}: choose from {', '.join(VARIANTS)}")
        checks.implementation("VIDLoss", impl)
        checks.pairs("VIDLoss", student_channels=student_channels, teacher_channels=teacher_channels)
        chosen = VARIANTS[variant]
        self.eps, self.factor, self.impl = chosen.eps, factor, impl
        self.regressors = nn.ModuleList(
            _Regressor((s, *(t * multiple for multiple in chosen.hidden_multiples)), t, chosen.batch_norm)
            for s, t in zip(student_channels, teacher_channels))
        raw = math.log(math.expm1(chosen.initial_variance - chosen.eps))  # the inverse of softplus
        self.raw_scales = nn.ParameterList(nn.Parameter(torch.full((t,), raw)) for t in teacher_channels)

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        return reduce(add, self.per_tap(student_maps, teacher_maps))

    def per_tap(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> list[Tensor]:
        """The loss of each tap, fp32 scalars."""
        checks.pairs("VIDLoss", count=len(self.regressors), student_maps=student_maps, teacher_maps=teacher_maps)
        return list(map(self._tap, range(len(self.regressors)), student_maps, teacher_maps))

    def _tap(self, index: int, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        regressor = self.regressors[index]
        checks.tap("VIDLoss", self.impl, **{f"student_maps[{index}]": (student_map, regressor.in_channels),
                                            f"teacher_maps[{index}]": (teacher_map, regressor.last.out_channels)})
        hidden = in_layout_of(student_map, regressor.hidden(student_map))
        return projected_vid_nll(hidden, regressor.last.weight, regressor.last.bias, teacher_map, self.raw_scales[index],
                                 eps=self.eps, factor=self.factor, impl=self.impl)

    def variances(self) -> list[Tensor]:
        """The learned variance of each channel, [C] per tap, detached."""
        return [F.softplus(raw_scale.detach()) + self.eps for raw_scale in self.raw_scales]


class _Regressor(nn.Module):
    """1x1 convolutions from one width to the next. The last is applied inside projected_vid_nll, which never needs to store the mean."""

    def __init__(self, widths: Sequence[int], out_channels: int, batch_norm: bool):
        super().__init__()
        self.in_channels = widths[0]
        layers = []
        for before, after in itertools.pairwise(widths):
            layers.append(nn.Conv2d(before, after, 1, bias=False))
            if batch_norm:
                layers.append(nn.BatchNorm2d(after))
            layers.append(nn.ReLU(inplace=True))
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Conv2d(widths[-1], out_channels, 1, bias=batch_norm)


class VariationalInformation(Transfer):
    """λ · VIDLoss at the variant's taps."""

    def __init__(self, options: VIDOptions, student: WideResNet, teacher: WideResNet):
        super().__init__()
        self.variant = VARIANTS[options.variant]
        self.least_variance = self.variant.eps
        self._taps = [TAPS.index(tap) for tap in self.variant.taps]
        self.loss = VIDLoss(
            [student.tap_channels[i] for i in self._taps], [teacher.tap_channels[i] for i in self._taps],
            variant=options.variant, factor=options.resolved().weight)

    def forward(self, student: Activations, teacher: Activations) -> dict[str, Tensor]:
        return dict(zip(self.variant.taps, self.loss.per_tap(self._maps(student), self._maps(teacher))))

    def _maps(self, activations: Activations) -> list[Tensor]:
        source = activations.activated if self.variant.activated else activations.stages
        return [source[i] for i in self._taps]

    def undecayed_parameters(self) -> list[nn.Parameter]:
        return [] if self.variant.decayed_scale else list(self.loss.raw_scales)

    def variances(self) -> dict[str, Tensor]:
        return dict(zip(self.variant.taps, self.loss.variances()))
