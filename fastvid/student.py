"""One student in training: network, method, optimizer, and the running sums of the losses."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastvid.config import TrainConfig
from fastvid.device import autocast
from fastvid.methods import Method, Terms, build
from fastvid.wresnet import Activations, WideResNet

LEAST_SCALE = 2.0**-14  # smallest loss scale in fp16, reached from the first scale after 30 skipped steps


class NetworkAndMethod(nn.Module):
    """Network and method as one module for torch.compile: (images, teacher_activations, labels) -> Terms."""

    def __init__(self, network: WideResNet, method: Method, device: torch.device, precision: str):
        super().__init__()
        self.network, self.method = network, method
        self._device, self._precision = device, precision

    def forward(self, images: Tensor, teacher_activations: Activations | None, labels: Tensor) -> Terms:
        with self.autocast():
            return self.method(self.network(images), teacher_activations, labels)

    def autocast(self) -> AbstractContextManager:
        return autocast(self._device, self._precision)


def new_student(
    name: str,
    settings: TrainConfig,
    num_classes: int,
    teacher: WideResNet | None,
    device: torch.device,
    build_method: Callable[..., Method] = build,
) -> Student:
    """A student with fresh weights, which do not depend on the other students of the group.

    The weights of the network depend on the seed. The weights of the regressors depend on seed and method.
    """
    (method_name,) = settings.method
    depth, width = settings.student_depth, settings.student_width
    if method_name == "teacher":
        depth, width = settings.teacher_depth, settings.teacher_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = WideResNet(depth, width, num_classes)
        torch.manual_seed(settings.seed + zlib.crc32(method_name.encode()))
        method = build_method(method_name, settings, network, teacher)
    return Student(name, network, method, settings, device)


class Student:
    """One student. `step` trains on one batch and never synchronises.

    All state changes in place, so that captured graphs can be replayed. After the first step with a NaN or
    inf in a loss or gradient, a student is frozen: no later update changes its weights.
    """

    def __init__(
        self, name: str, network: WideResNet, method: Method, settings: TrainConfig, device: torch.device
    ):
        self.name, self.settings = name, settings
        self.network = network.to(device, memory_format=torch.channels_last)
        self.method = method.to(device)
        self.module = NetworkAndMethod(self.network, self.method, device, settings.precision)
        for module in self.module.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None  # needed for momentum=None only; saves a kernel per layer
        self._forward = self.module
        self.parameters = list(self.module.parameters())
        undecayed = self.method.undecayed_parameters()
        exempt = {id(parameter) for parameter in undecayed}
        decayed = [parameter for parameter in self.parameters if id(parameter) not in exempt]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
        if undecayed:
            groups.append({"params": undecayed, "weight_decay": 0.0})
        self.learning_rate = torch.tensor(settings.learning_rate, device=device)  # captured graphs read this
        momentum = settings.momentum
        self.optimizer = torch.optim.SGD(
            groups, lr=self.learning_rate, momentum=momentum, nesterov=momentum > 0, fused=True
        )
        if momentum:
            # Fused SGD requires all momentum buffers or none, and a two-stage hint gives gradients to some
            # parameters only. Zeros are bit-identical to a fresh start.
            for parameter in self.parameters:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.scaler.scale(torch.zeros((), device=device))  # creates its tensors now
        self.loss_sums = torch.zeros(2, device=device)  # task and transfer, summed over images of an epoch
        self._failed = torch.zeros((), device=device)  # 1 after the first step with NaN or inf
        self._failed_steps, self._one = torch.zeros((), device=device), torch.ones((), device=device)
        if not self.scaler.is_enabled():  # an enabled GradScaler detects NaN and inf itself
            self.optimizer.found_inf = self._failed

    def compile(self) -> None:
        """Let torch.compile fuse forward, losses and backward, once for each batch size and phase."""
        self._forward = torch.compile(self.module, fullgraph=True, dynamic=False)

    def step(
        self, images: Tensor, teacher_activations: Activations | None, labels: Tensor, eager: bool = False
    ) -> None:
        """Forward, backward and update. eager: do not use the compiled module, even after compile()."""
        with record_function(f"{self.name}: forward"):
            terms = (self.module if eager else self._forward)(images, teacher_activations, labels)
        self.update(terms, len(labels))

    def update(self, terms: Terms, images: int) -> None:
        """Backward and one optimizer step for these terms, which are means over `images`."""
        with record_function(f"{self.name}: backward"):
            self.scaler.scale(terms.task + terms.transfer).backward()
        with record_function(f"{self.name}: update"):
            values = torch.stack(terms).detach()
            gradients = []
            if not self.scaler.is_enabled():
                gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._amp_foreach_non_finite_check_and_unscale_([values, *gradients], self._failed, self._one)
            self._failed_steps.add_(self._failed)
            if self.settings.clip_norm or self.method.has_regressors:
                self.scaler.unscale_(self.optimizer)
            self.method.clip_gradients()
            if self.settings.clip_norm:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.loss_sums.add_(values, alpha=images)

    def set_learning_rate(self, value: float) -> None:
        self.learning_rate.fill_(value)
        self.method.set_learning_rate(value)

    def losses(self, images: int) -> tuple[float, float]:
        """Mean task and transfer loss of an epoch of `images` images. Synchronises."""
        task, transfer = (self.loss_sums / images).tolist()
        return task, transfer

    def failed_steps(self) -> int:
        """Number of steps from the first step with NaN or inf, inclusive; else 0. Synchronises."""
        return int(self._failed_steps)

    def divergence(self) -> str | None:
        """Reason of a divergence, such as "transfer loss inf"; None without divergence. Synchronises."""
        for term, value in zip(("task", "transfer"), self.loss_sums.tolist()):
            if not math.isfinite(value):
                return f"{term} loss {value}"
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            return "gradients are NaN or inf in fp16 at every loss scale"
        return "a loss or gradient was NaN or inf" if self.failed_steps() else None

    @torch.no_grad()
    def information(self, images: Tensor, teacher_activations: Activations) -> dict[str, tuple[float, float]]:
        """{"vid at stem": (explained variance, nats per element)} of each regressor, in eval mode.

        methods.base.information has the equations. Synchronises.
        """
        if not self.method.has_regressors:
            return {}
        self.module.eval()
        with self.module.autocast():
            found = self.method.information(self.network(images), teacher_activations)
        self.module.train()
        return found

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes, except the two numbers of the GradScaler."""
        named = (tensor for part in self._named().values() for tensor in part.values())
        return [*named, self.loss_sums, self._failed, self._failed_steps]

    def state(self) -> dict:
        """Everything that another process needs to resume with the same bits."""
        return {
            **self._named(),
            "scaler": self.scaler.state_dict(),
            "loss_sums": self.loss_sums,
            "learning_rate": float(self.learning_rate),
        }

    def load_state(self, state: dict) -> None:
        """Copy `state` into this student. Raises ValueError if names, shapes or dtypes differ."""
        for part, own in self._named().items():
            _copy_into(own, state[part], part)
        _copy_into({"loss_sums": self.loss_sums}, {"loss_sums": state["loss_sums"]}, "state")
        self.set_learning_rate(state["learning_rate"])  # an evaluation may come before the next step
        if self.scaler.is_enabled():
            scale, tracker = (state["scaler"][name] for name in ("scale", "_growth_tracker"))
            changing = {"scale": float(scale), "_growth_tracker": int(tracker)}
            self.scaler.load_state_dict(self.scaler.state_dict() | changing)

    def _named(self) -> dict[str, dict[str, Tensor]]:
        momenta = {}
        if self.settings.momentum:
            momenta = {
                name: self.optimizer.state[parameter]["momentum_buffer"]
                for name, parameter in self.module.named_parameters()
            }
        return {"network": self.network.state_dict(), "method": self.method.state_dict(), "momenta": momenta}


@torch.no_grad()
def _copy_into(own: dict[str, Tensor], given: dict[str, Tensor], part: str) -> None:
    if own.keys() != given.keys():
        raise ValueError(f"its {part} has other names: {', '.join(sorted(own.keys() ^ given.keys())[:4])}")
    for name, tensor in own.items():
        if given[name].shape != tensor.shape or given[name].dtype != tensor.dtype:
            raise ValueError(f"{name} of its {part} is {given[name].dtype} {tuple(given[name].shape)}")
        tensor.copy_(given[name])
