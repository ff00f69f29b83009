"""What a distillation method is made of: Transfer terms, and the Method that adds them to the cross entropy."""

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
    """The two halves of a training loss, scalars: what the labels ask for, and what the teacher asks for (0 without one)."""

    task: Tensor
    transfer: Tensor


def in_layout_of(student_map: Tensor, output: Tensor) -> Tensor:
    """The output of a regressor, channels-last where its input is. It is already, but where a single channel left the layout open."""
    if student_map.is_contiguous(memory_format=torch.channels_last):
        output = output.contiguous(memory_format=torch.channels_last)
    return output


class Transfer(nn.Module):
    """One weighted transfer term: `transfer(student, teacher)` -> {tap: its part of the loss, a scalar}.

    A subclass is built from (options, student, teacher): its options of TrainConfig and the two networks, of which it reads
    `tap_channels`. It owns its regressors and registers every parameter.
    """

    task_weight = 1.0
    """Factor on the cross entropy while this term is in the loss."""
    alone = False
    """Whether this term is now the whole loss: no cross entropy and no other term, so what they alone would train stands still."""
    over = False
    """Whether this term has left the loss."""
    staged = False
    """Whether begin_epoch ever changes `alone` or `over`."""

    def forward(self, student: Activations, teacher: Activations) -> dict[str, Tensor]:
        raise NotImplementedError

    def begin_epoch(self, progress: float) -> None:
        """Called before each epoch with the share of the training that is done, for terms that change with it."""

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Parameters that weight decay must leave alone."""
        return []

    def variances(self) -> dict[str, Tensor]:
        """Learned variances per tap, [C] each; empty for methods without."""
        return {}

    def least_variances(self) -> dict[str, float]:
        """Their floor per tap."""
        return {}


class Method(nn.Module):
    """Cross entropy plus any number of transfer terms: `method(student, teacher, labels)` -> Terms."""

    def __init__(self, transfers: dict[str, Transfer]):
        super().__init__()
        self.transfers = nn.ModuleDict(transfers)

    def forward(self, student: Activations, teacher: Activations | None, labels: Tensor) -> Terms:
        task, *values = self.parts(student, teacher, labels).values()
        return Terms(task, reduce(add, values) if values else torch.zeros_like(task))

    def parts(self, student: Activations, teacher: Activations | None, labels: Tensor) -> dict[str, Tensor]:
        """What the loss is the sum of, by name: the cross entropy first, then each term at each of its taps."""
        terms = {name: term for name, term in self.transfers.items() if not term.over}
        alone = {name: term for name, term in terms.items() if term.alone}
        if alone:  # without a gradient nothing decays either
            task = labels.new_zeros((), dtype=torch.float32)
        else:
            task = F.cross_entropy(student.logits.float(), labels)
        weight = math.prod([term.task_weight for term in terms.values()])
        parts = {"cross entropy": task if weight == 1 else weight * task}
        for name, term in (alone or terms).items():
            parts |= {f"{name} at {tap}": value for tap, value in term(student, teacher).items()}
        return parts

    def begin_epoch(self, progress: float) -> None:
        for term in self.transfers.values():
            term.begin_epoch(progress)

    def phase(self) -> tuple[tuple[bool, bool], ...]:
        """What begin_epoch has changed: equal phases compute the same."""
        return tuple((term.alone, term.over) for term in self.transfers.values())

    def undecayed_parameters(self) -> list[nn.Parameter]:
        return [parameter for term in self.transfers.values() for parameter in term.undecayed_parameters()]

    def variances(self) -> dict[str, Tensor]:
        return {tap: values for term in self.transfers.values() for tap, values in term.variances().items()}

    def variances_at_their_floor(self) -> dict[str, int]:
        """How many channels of each tap have a variance below twice the least one, where there are any."""
        counts = {
            tap: int((values < 2 * term.least_variances()[tap]).sum())
            for term in self.transfers.values()
            for tap, values in term.variances().items()
        }
        return {tap: count for tap, count in counts.items() if count}
