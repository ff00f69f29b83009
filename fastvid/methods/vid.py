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
    floor: float
    """least variance of a map of C channels is floor / C, if that is more than eps: see least_variance"""
    initial_variance: float
    """of every channel, or twice the least where the least is more"""
    decayed_scale: bool
    """weight decay on the variance parameters too"""


VARIANTS = {
    # Not known to us from the paper, and so our choice: the exact place of the taps, the least and the first variances, no decay on them.
    # The variances were chosen on held-out training images (bench/results).
    "paper": Variant(
        TAPS,
        activated=True,
        hidden_multiples=(2, 2),
        batch_norm=True,
        eps=1e-5,
        floor=1.0,
        initial_variance=0.3,
        decayed_scale=False,
    ),
    # RepDistiller's, from the authors' code.
    "repdistiller": Variant(
        TAPS[1:],
        activated=False,
        hidden_multiples=(1, 1),
        batch_norm=False,
        eps=1e-5,
        floor=0.0,
        initial_variance=5.0,
        decayed_scale=True,
    ),
}


def least_variance(variant: Variant, channels: int) -> float:
    """Of a tap whose teacher map has so many channels.

    The loss λ·(t - μ)²/2v, a mean over C channels, has the curvature λ/(v·C) in the last bias of the regressor, and with Nesterov momentum
    m and learning rate η a step is stable only for curvatures below 2(1 + m)/(1 + 2m)/η. For λ = 10, η = 0.1, m = 0.9 that is v > 0.74/C.
    Without a floor above it, the stem's regressor ended worse than a constant on CIFAR-10: variances of up to tens, for a map whose own
    are below 0.15.
    """
    return max(variant.eps, variant.floor / channels)


class VIDLoss(nn.Module):
    """Sum over taps of the negative log-likelihood of teacher maps given student maps; holds regressors and variances.

    student_channels, teacher_channels: one number per tap, of maps [B, C, H, W] that agree in B, H and W.
    variant: a key of VARIANTS, for the regressor, the least and the initial variance.
    factor, impl: as in fastvid.kernels.projected_vid_nll, which says what runs in one kernel.
    Returns a scalar, fp32.
    Optimise its parameters together with the student's.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        variant: str = VIDOptions.variant,
        factor: float = 1.0,
        impl: str = "auto",
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"VIDLoss has no variant {variant!r}: choose from {', '.join(VARIANTS)}")
        checks.implementation("VIDLoss", impl)
        checks.pairs("VIDLoss", student_channels=student_channels, teacher_channels=teacher_channels)
        chosen = VARIANTS[variant]
        self.factor, self.impl = factor, impl
        self.least_variances = [least_variance(chosen, t) for t in teacher_channels]
        self.regressors = nn.ModuleList(
            _Regressor((s, *(t * multiple for multiple in chosen.hidden_multiples)), t, chosen.batch_norm)
            for s, t in zip(student_channels, teacher_channels)
        )
        initial = [
            chosen.initial_variance if chosen.initial_variance > least else 2 * least
            for least in self.least_variances
        ]
        raw = [
            math.log(math.expm1(first - least)) for first, least in zip(initial, self.least_variances)
        ]  # the inverse of softplus
        self.raw_scales = nn.ParameterList(
            nn.Parameter(torch.full((t,), value)) for t, value in zip(teacher_channels, raw)
        )

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        return reduce(add, self.per_tap(student_maps, teacher_maps))

    def per_tap(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> list[Tensor]:
        """The loss of each tap, fp32 scalars."""
        checks.pairs(
            "VIDLoss", count=len(self.regressors), student_maps=student_maps, teacher_maps=teacher_maps
        )
        return list(map(self._tap, range(len(self.regressors)), student_maps, teacher_maps))

    def _tap(self, index: int, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        regressor = self.regressors[index]
        checks.tap(
            "VIDLoss",
            self.impl,
            **{
                f"student_maps[{index}]": (student_map, regressor.in_channels),
                f"teacher_maps[{index}]": (teacher_map, regressor.last.out_channels),
            },
        )
        hidden = in_layout_of(student_map, regressor.hidden(student_map))
        return projected_vid_nll(
            hidden,
            regressor.last.weight,
            regressor.last.bias,
            teacher_map,
            self.raw_scales[index],
            eps=self.least_variances[index],
            factor=self.factor,
            impl=self.impl,
        )

    def variances(self) -> list[Tensor]:
        """The learned variance of each channel, [C] per tap, detached."""
        return [
            F.softplus(raw_scale.detach()) + least
            for raw_scale, least in zip(self.raw_scales, self.least_variances)
        ]


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
        self._taps = [TAPS.index(tap) for tap in self.variant.taps]
        self.loss = VIDLoss(
            [student.tap_channels[i] for i in self._taps],
            [teacher.tap_channels[i] for i in self._taps],
            variant=options.variant,
            factor=options.resolved().weight,
        )

    def forward(self, student: Activations, teacher: Activations) -> dict[str, Tensor]:
        return dict(zip(self.variant.taps, self.loss.per_tap(self._maps(student), self._maps(teacher))))

    def _maps(self, activations: Activations) -> list[Tensor]:
        source = activations.activated if self.variant.activated else activations.stages
        return [source[i] for i in self._taps]

    def undecayed_parameters(self) -> list[nn.Parameter]:
        return [] if self.variant.decayed_scale else list(self.loss.raw_scales)

    def variances(self) -> dict[str, Tensor]:
        return dict(zip(self.variant.taps, self.loss.variances()))

    def least_variances(self) -> dict[str, float]:
        return dict(zip(self.variant.taps, self.loss.least_variances))
