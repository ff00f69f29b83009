"""How one step executes: the teacher once, then every student's forward, loss, backward and update. Eager, AMP."""
from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fastvid.config import TrainConfig
from fastvid.errors import InputError
from fastvid.loader import EvalLoader
from fastvid.methods import Method
from fastvid.wresnet import WideResNet

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of --device. Raises InputError for one that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise InputError(f"fastvid does not run on {name!r}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"no GPU for --device {name}: torch {torch.__version__} sees {torch.cuda.device_count()}; "
                         "take --device cpu, or see `fastvid doctor`")
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")


class Learner:
    """One network in training, with its method, its optimizer and the running sums of its losses."""

    def __init__(self, name: str, network: WideResNet, method: Method, config: TrainConfig, device: torch.device):
        self.name = name
        self.network = network.to(device, memory_format=torch.channels_last)
        self.method = method.to(device)
        self.clip_norm = config.clip_norm
        self.parameters = [*self.network.parameters(), *self.method.parameters()]
        undecayed = self.method.undecayed_parameters()
        exempt = {id(parameter) for parameter in undecayed}
        groups = [{"params": [p for p in self.parameters if id(p) not in exempt], "weight_decay": config.weight_decay}]
        if undecayed:
            groups.append({"params": undecayed, "weight_decay": 0.0})
        self.optimizer = torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)
        if config.momentum:  # zeros give the bits that no buffer gives; the fused step wants all or none, and hints alone reach some
            for parameter in self.parameters:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.loss_sums = torch.zeros(2, device=device)  # of the task and transfer terms, over images of this epoch

    def update(self, task: Tensor, transfer: Tensor, images: int) -> None:
        """Backward and one optimizer step; nothing here waits for the device."""
        self.scaler.scale(task + transfer).backward()
        if self.clip_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sums += torch.stack((task, transfer)).detach() * images

    def take_losses(self, images: int) -> tuple[float, float]:
        """Mean (task, transfer) per image since the last call. Waits for the device. Raises InputError when not finite."""
        task, transfer = (self.loss_sums / images).tolist()
        self.loss_sums.zero_()
        if not math.isfinite(task + transfer):
            raise InputError(f"{self.name} diverged: task loss {task}, transfer loss {transfer}; lower its weight or --learning-rate, "
                             "set --clip-norm, or leave it out")
        return task, transfer

    def state(self) -> dict:
        return {"network": self.network.state_dict(), "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "loss_sums": self.loss_sums}

    def load_state(self, state: dict) -> None:
        for part in ("network", "method", "optimizer", "scaler"):
            getattr(self, part).load_state_dict(state[part])
        self.loss_sums.copy_(state["loss_sums"])


class GroupStep:
    """One step of all students of a group, on the same batch and from the same teacher forward."""

    def __init__(self, teacher: WideResNet | None, learners: list[Learner], device: torch.device, precision: str):
        self.teacher = teacher and teacher.to(device, memory_format=torch.channels_last)
        self.learners, self.device, self.precision = learners, device, precision

    def begin_epoch(self, progress: float) -> None:
        for learner in self.learners:
            learner.network.train()
            learner.method.train()
            learner.method.begin_epoch(progress)

    def __call__(self, images: Tensor, labels: Tensor, learning_rate: float) -> None:
        taught = None
        if self.teacher is not None:
            with torch.no_grad(), autocast(self.device, self.precision):
                taught = self.teacher(images)
        for learner in self.learners:
            for group in learner.optimizer.param_groups:
                group["lr"] = learning_rate
            with autocast(self.device, self.precision):
                task, transfer = learner.method(learner.network(images), taught, labels)
            learner.update(task, transfer, len(labels))


@torch.no_grad()
def evaluate(network: WideResNet, loader: EvalLoader, device: torch.device, precision: str) -> float:
    """Top-1 accuracy in percent, in eval mode."""
    was_training = network.training
    network.eval()
    correct, total = torch.zeros((), dtype=torch.int64, device=device), 0
    for images, labels in loader:
        with autocast(device, precision):
            logits = network(images).logits
        correct += (logits.argmax(dim=1) == labels).sum()
        total += len(labels)
    network.train(was_training)
    return 100 * correct.item() / total
