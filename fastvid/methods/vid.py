"""Variational information distillation (VID; Ahn et al., CVPR 2019).

    loss = CE + λ·Σ over taps of -log q(teacher map | student map)

q is a Gaussian per channel. A regressor predicts its mean from the student map. Its variance is one learned
number per channel, so that channels which the student cannot predict have less weight.

Why training is stable. The last layer of a regressor computes the mean from K hidden units h = ReLU(BN(.)).
With h̃ = (h, 1), the loss has the curvature λ/(C·v)·E[h̃h̃ᵀ] in the weights of one of the C channels. The batch
norm has no scale and no shift, so for independent units E[h] = 0.4 and E[h²] = 0.5, and the common direction
of all units has the eigenvalue 0.16·K + 1.3. SGD with Nesterov momentum m is stable for curvatures below
2(1 + m)/(1 + 2m)/η, which is at least 4/(3η). Hence the floor

    v >= λ·η·(0.12·K + 1)/C        (least_variance)

Each variance is softplus(raw_scale) plus that floor at the current learning rate η: the floor falls with η.
Dependent units have a larger eigenvalue; `clip_gradients` bounds the oscillations that this can cause.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.config import VIDOptions
from fastvid.kernels import checks, projected_vid_nll
from fastvid.methods.base import Transfer, as_taps, clip_to_weights, in_layout_of
from fastvid.wresnet import TAPS, Activations, WideResNet

EPS = 1e-5
"""Smallest possible variance, at any learning rate."""


@dataclass(frozen=True)
class Variant:
    """The choices in which versions of VID differ."""

    taps: tuple[str, ...]
    """taps whose maps the regressors predict"""
    activated: bool
    """True: maps after batch norm and ReLU; False: the residual sums before them"""
    hidden_widths: Callable[[int, int], tuple[int, ...]]
    """widths of the regressor's hidden layers, from the channels of student and teacher"""
    norm_first: bool
    """whether batch norm and ReLU precede the first convolution"""
    batch_norm: bool
    """whether a batch norm without scale and shift follows each hidden convolution; then no unit can die"""
    bias: bool
    """whether the last convolution has a bias"""
    initial_variance: float
    """first variance of every channel, above its floor"""
    decayed_scale: bool = False
    """whether weight decay applies to the variance parameters"""
    floor: bool = True
    """whether variances stay above least_variance"""
    learned: bool = True
    """whether the variances are trained; fixed variances keep initial_variance above the floor"""


VARIANTS = {
    # The paper does not state the exact taps, the first variances, or their weight decay. These choices were
    # made on held-out training images (bench/results/README.md).
    "paper": Variant(
        taps=TAPS,
        activated=False,
        hidden_widths=lambda s, t: (2 * t,),
        norm_first=False,
        batch_norm=True,
        bias=True,
        initial_variance=0.3,
    ),
    # Regressor, taps and first variance of hushell/wgan_distil, a repository of one of the authors.
    "authors": Variant(
        taps=TAPS,
        activated=False,
        hidden_widths=lambda s, t: (2 * (s + t),),
        norm_first=True,
        batch_norm=True,
        bias=False,
        initial_variance=math.log(2),
    ),
    # Regressor, taps, first variance and weight decay of RepDistiller, whose VID is "code from author".
    "repdistiller": Variant(
        taps=TAPS[1:],
        activated=False,
        hidden_widths=lambda s, t: (t, t),
        norm_first=False,
        batch_norm=False,
        bias=False,
        initial_variance=5.0 - EPS,
        decayed_scale=True,
        floor=False,
    ),
}


def least_variance(factor: float, learning_rate: float, hidden: int, channels: int) -> float:
    """Floor of the variances of a tap with `hidden` units and `channels` teacher channels (derived above)."""
    return factor * learning_rate * (0.12 * hidden + 1) / channels


class VIDLoss(nn.Module):
    """Sum over taps of the negative log-likelihood of teacher maps given student maps.

    The module owns the regressors and the variances; train its parameters together with the student.
    student_channels, teacher_channels: one number per tap, or one number each for a single pair of maps. Maps
    are [B, C, H, W], and the two maps of a pair agree in B, H and W.
    variant: a key of VARIANTS, or a Variant: the regressor, the first variance and its floor.
    factor: the weight λ of the loss. Give the weight here, because the floor of the variances depends on λ.
    learning_rate: the largest learning rate of the SGD optimizer that trains this module.
    impl: as in fastvid.kernels.projected_vid_nll, which describes what runs in one kernel.
    Returns a scalar, fp32.  Raises ValueError if shapes do not fit.

    In your training loop, call `clip_gradients()` between backward() and step(), and
    `set_learning_rate(value)` after each change of the learning rate. The floor of the variances
    then falls with the learning rate. bench/results/README.md says for which factors this was tried.
    """

    def __init__(
        self,
        student_channels: Sequence[int] | int,
        teacher_channels: Sequence[int] | int,
        *,
        variant: str | Variant = VIDOptions.variant,
        factor: float = 1.0,
        learning_rate: float = 0.1,
        impl: str = "auto",
    ):
        super().__init__()
        student_channels, teacher_channels = as_taps(student_channels), as_taps(teacher_channels)
        if not isinstance(variant, Variant) and variant not in VARIANTS:
            raise ValueError(f"VIDLoss has no variant {variant!r}: choose from {', '.join(VARIANTS)}")
        checks.implementation("VIDLoss", impl)
        checks.pairs("VIDLoss", student_channels=student_channels, teacher_channels=teacher_channels)
        chosen = variant if isinstance(variant, Variant) else VARIANTS[variant]
        self.factor, self.impl = factor, impl
        self.regressors = nn.ModuleList(
            _Regressor(s, t, chosen) for s, t in zip(student_channels, teacher_channels)
        )
        self._slopes = [  # floor of the variances per unit of learning rate
            least_variance(factor, 1.0, regressor.last.in_channels, t) if chosen.floor else 0.0
            for regressor, t in zip(self.regressors, teacher_channels)
        ]
        # a buffer, because replayed graphs read its current value; not persistent: no part of the weights
        self.register_buffer("learning_rate", torch.tensor(float(learning_rate)), persistent=False)
        raw = math.log(math.expm1(chosen.initial_variance))  # the inverse of softplus
        self.raw_scales = nn.ParameterList(
            nn.Parameter(torch.full((channels,), raw), requires_grad=chosen.learned)
            for channels in teacher_channels
        )

    def set_learning_rate(self, value: float) -> None:
        """Tell the module the current learning rate of its optimizer. Does not synchronise."""
        self.learning_rate.fill_(value)

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
        checks.pairs("VIDLoss", count=count, student_maps=student_maps, teacher_maps=teacher_maps)
        return list(map(self._tap, range(count), student_maps, teacher_maps))

    def clip_gradients(self) -> None:
        """Call clip_to_weights on the regressors. Use this between backward() and step()."""
        clip_to_weights(self.regressors)

    def _tap(self, index: int, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        regressor = self.regressors[index]
        maps = {
            f"student_maps[{index}]": (student_map, regressor.in_channels),
            f"teacher_maps[{index}]": (teacher_map, regressor.last.out_channels),
        }
        checks.tap("VIDLoss", self.impl, **maps)
        hidden = in_layout_of(student_map, regressor.hidden(student_map))
        scale = inverse_softplus(self._variance(index) - EPS)
        weight, bias = regressor.last.weight, regressor.last.bias
        return projected_vid_nll(
            hidden, weight, bias, teacher_map, scale, eps=EPS, factor=self.factor, impl=self.impl
        )

    def _variance(self, index: int) -> Tensor:
        return F.softplus(self.raw_scales[index]) + (self._slopes[index] * self.learning_rate + EPS)

    def variances(self) -> list[Tensor]:
        """The variance of each channel, [C] per tap, detached."""
        return [self._variance(index).detach() for index in range(len(self.regressors))]

    def predictions(self, student_maps: Sequence[Tensor]) -> list[Tensor]:
        """Predictions of the teacher maps (the means of the Gaussians) from the student's maps."""
        return [
            regressor.last(regressor.hidden(student_map))
            for regressor, student_map in zip(self.regressors, student_maps)
        ]


def inverse_softplus(value: Tensor) -> Tensor:
    """Return x with softplus(x) = value, for value > 0, without overflow for large values."""
    return value + torch.log(-torch.expm1(-value))


class _Regressor(nn.Module):
    """1x1 convolutions from student to teacher channels.

    projected_vid_nll applies the last convolution without storing the mean.
    """

    def __init__(self, student_channels: int, teacher_channels: int, variant: Variant):
        super().__init__()
        self.in_channels = student_channels
        widths = (student_channels, *variant.hidden_widths(student_channels, teacher_channels))
        layers = [nn.BatchNorm2d(student_channels), nn.ReLU()] if variant.norm_first else []
        for before, after in itertools.pairwise(widths):
            layers.append(nn.Conv2d(before, after, 1, bias=False))
            if variant.batch_norm:
                layers.append(nn.BatchNorm2d(after, affine=False))
            layers.append(nn.ReLU(inplace=True))
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Conv2d(widths[-1], teacher_channels, 1, bias=variant.bias)


class VariationalInformation(Transfer):
    """λ · VIDLoss at the taps of the variant."""

    title, colour = "VID", "#D55E00"
    has_regressors = True

    def __init__(
        self, options: VIDOptions, student: WideResNet, teacher: WideResNet, variant: Variant | None = None
    ):
        super().__init__()
        self.variant = variant or VARIANTS[options.variant]
        self._taps = [TAPS.index(tap) for tap in self.variant.taps]
        self.loss = VIDLoss(
            [student.tap_channels[tap] for tap in self._taps],
            [teacher.tap_channels[tap] for tap in self._taps],
            variant=self.variant,
            factor=options.resolved().weight,
        )

    def forward(self, student: Activations, teacher: Activations) -> dict[str, Tensor]:
        return dict(zip(self.variant.taps, self.loss.per_tap(self._maps(student), self._maps(teacher))))

    def predictions(self, student: Activations, teacher: Activations) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = zip(self.loss.predictions(self._maps(student)), self._maps(teacher))
        return dict(zip(self.variant.taps, pairs))

    def _maps(self, activations: Activations) -> list[Tensor]:
        source = activations.activated if self.variant.activated else activations.stages
        return [source[tap] for tap in self._taps]

    def set_learning_rate(self, value: float) -> None:
        self.loss.set_learning_rate(value)

    def undecayed_parameters(self) -> list[nn.Parameter]:
        return [] if self.variant.decayed_scale else list(self.loss.raw_scales)

    def variances(self) -> dict[str, Tensor]:
        return dict(zip(self.variant.taps, self.loss.variances()))
