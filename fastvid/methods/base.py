"""A distillation method is the cross entropy plus any number of Transfer terms."""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.wresnet import Activations


class Terms(NamedTuple):
    """The two scalar parts of a training loss: from the labels, and from the teacher (0 without teacher)."""

    task: Tensor
    transfer: Tensor


def as_taps(value):
    """A list with one entry per tap: a single map or number becomes a list of one."""
    return [value] if isinstance(value, (Tensor, int)) else value


def in_layout_of(student_map: Tensor, output: Tensor) -> Tensor:
    """The output of a regressor, channels-last like the input: with one channel, the layout is ambiguous."""
    if student_map.is_contiguous(memory_format=torch.channels_last):
        output = output.contiguous(memory_format=torch.channels_last)
    return output


CLIP_RATIO = 0.3


@torch.no_grad()
def clip_to_weights(module: nn.Module, ratio: float = CLIP_RATIO) -> None:
    """Clip the gradient norm of each parameter of `module` to `ratio` times the norm of that parameter.

    This is adaptive gradient clipping per tensor (Brock et al. 2021). With a learning rate η and momentum m,
    a step changes a parameter by about ratio·η/(1 - m) of its norm at most, however large the loss is.
    Call this function between backward() and the optimizer's step, and in fp16 after
    `scaler.unscale_(optimizer)`. Does not synchronise.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    if not parameters:
        return
    gradients = [parameter.grad for parameter in parameters]
    limits = ratio * torch.stack(torch._foreach_norm(parameters)).clamp(min=1e-3)
    factors = (limits / torch.stack(torch._foreach_norm(gradients)).clamp(min=1e-12)).clamp(max=1)
    torch._foreach_mul_(gradients, list(factors.unbind()))


class Transfer(nn.Module):
    """One weighted transfer term: `transfer(student, teacher)` -> {tap: scalar loss at this tap}.

    A subclass is built from (options, student, teacher): its options in TrainConfig and the two networks, of
    which the subclass reads `tap_channels`. The subclass owns its regressors and registers every parameter.
    """

    title, colour = "", ""
    """Title and colour in tables and plots. An empty title means the name of the term in capitals."""

    task_weight = 1.0
    """Factor on the cross entropy while this term is part of the loss."""
    alone = False
    """Whether this term is the whole loss at present. Layers that only other terms train are then frozen."""
    over = False
    """Whether this term is no longer part of the loss."""
    has_regressors = False
    """Whether `predictions` returns something, and `loss.clip_gradients` exists."""

    def forward(self, student: Activations, teacher: Activations) -> dict[str, Tensor]:
        raise NotImplementedError

    def begin_epoch(self, progress: float) -> None:
        """Called before each epoch with the share of the training that is done."""

    def set_learning_rate(self, value: float) -> None:
        """Called whenever the learning rate changes."""

    def predictions(self, student: Activations, teacher: Activations) -> dict[str, tuple[Tensor, Tensor]]:
        """{tap: (prediction of the teacher map, teacher map)} of every regressor; {} without regressors."""
        return {}

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Parameters without weight decay."""
        return []

    def variances(self) -> dict[str, Tensor]:
        """Learned variances per tap, [C] each; {} without learned variances."""
        return {}


class Method(nn.Module):
    """Cross entropy plus any number of transfer terms: (student, teacher_activations, labels) -> Terms."""

    def __init__(self, transfers: dict[str, Transfer]):
        super().__init__()
        self.transfers = nn.ModuleDict(transfers)

    def forward(self, student: Activations, teacher: Activations | None, labels: Tensor) -> Terms:
        terms = [term for term in self.transfers.values() if not term.over]
        alone = [term for term in terms if term.alone]
        if alone:  # a constant: layers without a gradient get no weight decay, so they are frozen
            task = labels.new_zeros((), dtype=torch.float32)
        else:
            task = F.cross_entropy(student.logits.float(), labels)
        weight = math.prod([term.task_weight for term in terms])
        task = task if weight == 1 else weight * task
        losses = [loss for term in alone or terms for loss in term(student, teacher).values()]
        return Terms(task, reduce(add, losses) if losses else torch.zeros_like(task))

    def begin_epoch(self, progress: float) -> None:
        for term in self.transfers.values():
            term.begin_epoch(progress)

    def set_learning_rate(self, value: float) -> None:
        for term in self.transfers.values():
            term.set_learning_rate(value)

    @property
    def title(self) -> str:
        """Title in tables and plots, such as KD+VID; "" without transfer terms."""
        return "+".join(term.title or name.upper() for name, term in self.transfers.items())

    @property
    def colour(self) -> str:
        """Colour in plots; "" for a sum of terms, which gets the next free colour."""
        return next(iter(self.transfers.values())).colour if len(self.transfers) == 1 else ""

    @property
    def has_regressors(self) -> bool:
        return any(term.has_regressors for term in self.transfers.values())

    def clip_gradients(self) -> None:
        """Bound the gradients of all regressors; see clip_to_weights."""
        for term in self.transfers.values():
            if term.has_regressors and not term.over:
                term.loss.clip_gradients()

    def phase(self) -> tuple[tuple[bool, bool], ...]:
        """The flags that begin_epoch changes. Steps in equal phases compute the same function."""
        return tuple((term.alone, term.over) for term in self.transfers.values())

    def undecayed_parameters(self) -> list[nn.Parameter]:
        return [parameter for term in self.transfers.values() for parameter in term.undecayed_parameters()]

    def variances(self) -> dict[str, Tensor]:
        return {tap: values for term in self.transfers.values() for tap, values in term.variances().items()}

    def information(self, student: Activations, teacher: Activations) -> dict[str, tuple[float, float]]:
        """{"vid at stem": (explained variance, nats per element)} of every regressor. Synchronises."""
        return {
            f"{name} at {tap}": information(prediction.float(), target.float())
            for name, term in self.transfers.items()
            for tap, (prediction, target) in term.predictions(student, teacher).items()
        }


def information(prediction: Tensor, target: Tensor) -> tuple[float, float]:
    """Information of a prediction about its target: (explained variance, nats per element).

        explained variance   1 - Σ_c S_c / Σ_c M·Var_c,   S_c = Σ_m (prediction - target)²
        nats per element     mean over c of ½·log(Var_c / (S_c / M))

    prediction, target: [B, C, H, W].
    The nats are the lower bound of the mutual information that VID maximises (Ahn et al., CVPR 2019), for the
    best variance of each channel. Both numbers are 0 for the best constant prediction, and negative for a
    worse prediction. Channels with a constant target are ignored.
    """
    residual = (prediction - target).square().mean(dim=(0, 2, 3))
    variance = target.var(dim=(0, 2, 3), unbiased=False)
    varying = variance > 1e-12
    residual, variance = residual[varying], variance[varying]
    explained = 1 - residual.sum() / variance.sum()
    return float(explained), float(0.5 * (variance / residual.clamp(min=1e-12)).log().mean())
