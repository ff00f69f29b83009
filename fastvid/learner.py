"""One network in training: with its method, its optimizer, and the running sums of its losses."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from fastvid.config import TrainConfig
from fastvid.device import autocast
from fastvid.distributed import ALONE, Ranks
from fastvid.errors import InputError
from fastvid.methods import Method, Terms
from fastvid.wresnet import Activations, WideResNet

LEAST_SCALE = 2.0**-14  # of the loss in fp16: 30 skipped steps below where it starts


class Student(nn.Module):
    """Network and method as one module, so that one wrapper sees every parameter: `(images, taught, labels)` -> Terms."""

    def __init__(self, network: WideResNet, method: Method, device: torch.device, precision: str):
        super().__init__()
        self.network, self.method = network, method
        self._device, self._precision = device, precision

    def forward(self, images: Tensor, taught: Activations | None, labels: Tensor) -> Terms:
        with self.autocast():
            return self.method(self.network(images), taught, labels)

    def autocast(self) -> AbstractContextManager:
        return autocast(self._device, self._precision)


class Learner:
    """`step` trains it on one batch; nothing in it waits for the device. All its state is written in place, so graphs can be replayed.

    From the first step on whose losses or gradients are not finite it stands still: no update follows (`failed_steps`).
    """

    def __init__(
        self, name: str, network: WideResNet, method: Method, config: TrainConfig, device: torch.device
    ):
        self.name = name
        self.network = network.to(device, memory_format=torch.channels_last)
        self.method = method.to(device)
        student = Student(self.network, self.method, device, config.precision)
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = (
                    None  # only a momentum of None needs it: a kernel less per layer and step
                )
        self.forward = self.student = student
        self.clip_norm = config.clip_norm
        self.parameters = [*self.network.parameters(), *self.method.parameters()]
        undecayed = self.method.undecayed_parameters()
        exempt = {id(parameter) for parameter in undecayed}
        groups = [
            {
                "params": [p for p in self.parameters if id(p) not in exempt],
                "weight_decay": config.weight_decay,
            }
        ]
        if undecayed:
            groups.append({"params": undecayed, "weight_decay": 0.0})
        self.learning_rate = torch.tensor(
            config.learning_rate, device=device
        )  # a tensor: graphs read it when they are replayed
        self.optimizer = torch.optim.SGD(
            groups, lr=self.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0, fused=True
        )
        if config.momentum:  # zeros give the bits that no buffer gives; the fused step wants all or none, and hints alone reach some
            for parameter in self.parameters:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.scaler.scale(torch.zeros((), device=device))  # makes its tensors now
        self.loss_sums = torch.zeros(
            2, device=device
        )  # of the task and transfer terms, over images of this epoch
        self.failed = torch.zeros(
            (), device=device
        )  # 1 from the first step on whose losses or gradients are not finite
        self._failed_steps, self._one = torch.zeros((), device=device), torch.ones((), device=device)
        if not self.scaler.is_enabled():  # else the scaler tells its own: it skips a step and scales less
            self.optimizer.found_inf = self.failed

    def compile(self) -> None:
        """Let torch.compile fuse forward, losses and backward; each batch size and phase of the method is compiled when it comes."""
        self.forward = torch.compile(self.forward, fullgraph=True, dynamic=False)

    def distribute(self, ranks: Ranks) -> None:
        """Average the gradients over the ranks of a job (DistributedDataParallel)."""
        warnings.filterwarnings(
            "ignore", "Grad strides do not match bucket view"
        )  # of 1x1 convolutions, where both name the same order
        staged = any(term.staged for term in self.method.transfers.values())
        group = ranks.group if self.loss_sums.is_cuda else None
        self.forward = DistributedDataParallel(
            self.forward, process_group=group, find_unused_parameters=staged
        )

    def step(
        self,
        images: Tensor,
        taught: Activations | None,
        labels: Tensor,
        weight: float = 1.0,
        eager: bool = False,
    ) -> None:
        """Forward, backward and update. weight: factor on the loss, for ranks whose batches differ in size. eager: not compiled."""
        with record_function(f"{self.name}: forward"):
            task, transfer = (self.student if eager else self.forward)(images, taught, labels)
        self.update(task, transfer, len(labels), weight)

    def update(self, task: Tensor, transfer: Tensor, images: int, weight: float = 1.0) -> None:
        """Backward and one optimizer step for these two terms, means over `images`."""
        loss = task + transfer
        with record_function(f"{self.name}: backward"):
            self.scaler.scale(loss if weight == 1 else loss * weight).backward()
        with record_function(f"{self.name}: update"):
            terms = torch.stack((task, transfer)).detach()
            gradients = (
                [] if self.scaler.is_enabled() else [p.grad for p in self.parameters if p.grad is not None]
            )
            torch._amp_foreach_non_finite_check_and_unscale_([terms, *gradients], self.failed, self._one)
            self._failed_steps.add_(self.failed)
            if self.clip_norm:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.loss_sums.add_(terms, alpha=images if weight else 0)

    def set_learning_rate(self, value: float) -> None:
        self.learning_rate.fill_(value)

    def losses(self, images: int, ranks: Ranks = ALONE) -> tuple[float, float]:
        """Mean (task, transfer) of an epoch of so many images over all ranks. Waits for the device. InputError when not finite."""
        task, transfer = (ranks.sum(self.loss_sums) / images).tolist()
        if not math.isfinite(task + transfer):  # a sum of finite ones may overflow
            raise InputError(
                f"{self.name} diverged: task loss {task}, transfer loss {transfer} over an epoch; lower its weight or "
                "--learning-rate, set --clip-norm, or leave it out"
            )
        return task, transfer

    def failed_steps(self) -> int:
        """How many steps of this start were not made, since their or an earlier one's losses or gradients are not finite. Waits."""
        return int(self._failed_steps)

    def has_failed(self) -> bool:
        """Whether it stands still, or its losses are beyond counting. Waits for the device."""
        return self.failed_steps() > 0 or self.scale_is_lost() or not self.loss_sums.isfinite().all()

    def scale_is_lost(self) -> bool:
        """Whether gradients in fp16 were not finite at ever smaller scales of the loss, so that step after step was skipped. Waits."""
        return self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE

    def first_not_finite(self, images: Tensor, taught: Activations | None, labels: Tensor) -> str | None:
        """What comes out of a step on this batch that is not finite: the name of a part of the loss, or of a parameter's gradient."""
        student = self.student
        with student.autocast():
            parts = student.method.parts(student.network(images), taught, labels)
        for name, value in parts.items():
            if not value.isfinite():
                return f"the loss of {name} is {value.item()}"
        loss = torch.stack(list(parts.values())).sum()
        if not loss.isfinite():
            return f"the sum of its losses is {loss.item()}, the largest of them {max(parts, key=lambda name: abs(parts[name]))}"
        loss.backward()
        gradients = (
            (name, parameter.grad)
            for name, parameter in student.named_parameters()
            if parameter.grad is not None
        )
        return next(
            (
                f"the gradient of {name} is not finite"
                for name, gradient in gradients
                if not gradient.isfinite().all()
            ),
            None,
        )

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes, but the scaler's two numbers."""
        named = (tensor for part in self._named().values() for tensor in part.values())
        return [*named, self.loss_sums, self.failed, self._failed_steps]

    def state(self) -> dict:
        return {**self._named(), "scaler": self.scaler.state_dict(), "loss_sums": self.loss_sums}

    def load_state(self, state: dict) -> None:
        """Take over the values of `state`, each into the tensor that is there. Raises ValueError when one fits none."""
        for part, own in self._named().items():
            _fill(own, state[part], part)
        _fill({"loss_sums": self.loss_sums}, {"loss_sums": state["loss_sums"]}, "state")
        if self.scaler.is_enabled():
            changing = {
                "scale": float(state["scaler"]["scale"]),
                "_growth_tracker": int(state["scaler"]["_growth_tracker"]),
            }
            self.scaler.load_state_dict(self.scaler.state_dict() | changing)

    def _named(self) -> dict[str, dict[str, Tensor]]:
        """What a step changes and the next start needs, by part and name."""
        momenta = {
            name: self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.student.named_parameters()
            if self.optimizer.defaults["momentum"]
        }
        return {"network": self.network.state_dict(), "method": self.method.state_dict(), "momenta": momenta}


@torch.no_grad()
def _fill(own: dict[str, Tensor], given: dict[str, Tensor], part: str) -> None:
    if own.keys() != given.keys():
        raise ValueError(f"its {part} has other names: {', '.join(sorted(own.keys() ^ given.keys())[:4])}")
    for name, tensor in own.items():
        if given[name].shape != tensor.shape or given[name].dtype != tensor.dtype:
            raise ValueError(f"{name} of its {part} is {given[name].dtype} {tuple(given[name].shape)}")
        tensor.copy_(given[name])
