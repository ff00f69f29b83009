"""Time a training step in its own process, from the plain step to the step of fastvid.

    python bench/step.py SPEC     SPEC is a Step as JSON

Prints "ready". Then, for each line N on stdin, takes one step that is not timed, and prints the seconds of N
steps. Each variant needs its own process, because allocator, threads and compiled code belong to a process,
and because memory that one variant has allocated would help the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from clock import DEVICE, synchronize
from torch import Tensor

from fastvid import datasets
from fastvid.config import TrainConfig
from fastvid.device import DTYPES, autocast, tune
from fastvid.loader import Batch, train_loader
from fastvid.methods import Method, build
from fastvid.plan import BatchPlan
from fastvid.step import GroupStep, Mode
from fastvid.student import Student
from fastvid.wresnet import WideResNet, frozen


@dataclass(frozen=True)
class Step:
    """The training, and the optimisations of fastvid that are on. By default all are off: the plain step."""

    methods: tuple[str, ...] = ("vid",)
    data: str = ""
    """folder of cifar-10-batches-py"""
    batch: int = 128
    student: tuple[int, int] = (16, 1)
    loader: str = "torchvision"
    """torchvision, dali, torch, or static (always the same batch)"""
    channels_last: bool = False
    precision: str = "fp32"
    idle_teacher: bool = True
    """whether the teacher runs even for a method that does not use it"""
    shared_teacher: bool = False
    """whether all methods share a batch and a teacher forward"""
    frozen_teacher: bool = False
    """whether the teacher has folded batch norms and weights in the compute type"""
    fused_losses: bool = False
    """the losses of fastvid; else the equations in plain PyTorch"""
    engine: tuple[bool, bool] | None = None
    """Mode (compiled, captured) of GroupStep; None: forward, backward, SGD and loss.item() for each method"""
    tuned: bool = False
    """whether fastvid.device.tune sets up allocator and cuDNN"""


def plain_loader(spec: Step, arrays: datasets.Arrays) -> Iterator[Batch]:
    """A DataLoader of torchvision's CIFAR-10, with the usual transforms and two persistent workers."""
    import torchvision
    from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor

    crop, normalise = RandomCrop(32, 4, padding_mode="reflect"), Normalize(arrays.mean, arrays.std)
    transform = Compose([crop, RandomHorizontalFlip(), ToTensor(), normalise])
    images = torchvision.datasets.CIFAR10(spec.data, train=True, transform=transform)
    workers = dict(num_workers=2, persistent_workers=True, pin_memory=DEVICE.type == "cuda")
    loader = torch.utils.data.DataLoader(images, spec.batch, shuffle=True, drop_last=True, **workers)
    while True:
        for images, labels in loader:
            yield Batch(images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True))


def static_loader(spec: Step, arrays: datasets.Arrays) -> Iterator[Batch]:
    batch = next(our_loader(dataclasses.replace(spec, loader="torch"), arrays))
    return itertools.repeat(batch)


def our_loader(spec: Step, arrays: datasets.Arrays) -> Iterator[Batch]:
    plan = BatchPlan(len(arrays), spec.batch, seed=0)
    loader = train_loader(arrays, plan, backend=spec.loader, device=DEVICE)
    batches = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
    return (batch for batch in batches if len(batch.labels) == spec.batch)


def plain_step(
    spec: Step, teacher: WideResNet, students: dict[str, tuple[WideResNet, Method]], batches: Iterator[Batch]
) -> Callable:
    """Forward, backward, torch's default SGD and loss.item(), one method after another."""
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    teacher_dtype = DTYPES[spec.precision] if spec.frozen_teacher else torch.float32
    teacher = frozen(teacher, teacher_dtype) if spec.frozen_teacher else teacher.to(memory_format=layout)
    optimizers = {}
    for name, (network, method) in students.items():
        network.to(memory_format=layout).train()
        parameters = [*network.parameters(), *method.parameters()]
        optimizers[name] = torch.optim.SGD(
            parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        for transfer in method.transfers.values():
            if not spec.fused_losses:
                transfer.loss.impl = "reference"

    @torch.no_grad()
    def teach(images: Tensor):
        with contextlib.nullcontext() if spec.frozen_teacher else autocast(DEVICE, spec.precision):
            return teacher(images.to(teacher_dtype))

    def step() -> None:
        shared = None
        for name, (network, method) in students.items():
            if shared is None or not spec.shared_teacher:
                images, labels = shared = next(batches)
                images = images.contiguous(memory_format=layout)
                needed = spec.shared_teacher or spec.idle_teacher or method.transfers
                teacher_activations = teach(images) if needed else None
            with autocast(DEVICE, spec.precision):
                terms = method(network(images), teacher_activations, labels)
            loss = terms.task + terms.transfer
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            loss.item()

    return step


def our_step(
    spec: Step, teacher: WideResNet, students: dict[str, tuple[WideResNet, Method]], batches: Iterator[Batch]
) -> Callable:
    config = TrainConfig(precision=spec.precision)
    group = [Student(name, network, method, config, DEVICE) for name, (network, method) in students.items()]
    needed = any(method.transfers for _, method in students.values())
    ours = GroupStep(teacher if needed else None, group, DEVICE, spec.precision, Mode(*spec.engine))
    ours.begin_epoch(0.0)
    return lambda: ours(*next(batches), 0.01)


def main(spec: Step) -> None:
    if spec.tuned:
        tune(DEVICE)
    torch.manual_seed(0)
    arrays = datasets.load("cifar10", spec.data, "train")
    teacher = WideResNet(40, 2).eval().requires_grad_(False).to(DEVICE)
    students = {}
    for name in spec.methods:
        student = WideResNet(*spec.student)
        method = build(name, TrainConfig(method=(name,)), student, teacher)
        students[name] = student.to(DEVICE), method.to(DEVICE)
    loader = {"torchvision": plain_loader, "static": static_loader}.get(spec.loader, our_loader)
    batches = loader(spec, arrays)
    step = (plain_step if spec.engine is None else our_step)(spec, teacher, students, batches)
    step()  # compiles and captures
    synchronize()
    print("ready", flush=True)
    for line in sys.stdin:
        step()  # replaces the data of other processes in the caches
        synchronize()
        started = time.perf_counter()
        for _ in range(int(line)):
            step()
        synchronize()
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1]).items()
    main(Step(**{name: tuple(value) if isinstance(value, list) else value for name, value in given}))
