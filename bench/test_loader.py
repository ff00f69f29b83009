"""How fast batches come: ours by DALI and by torch beside torchvision's DataLoader, on the real CIFAR-10, in one run.

    python -m pytest bench/test_loader.py --data DIR [--rows FILE.jsonl] [--quick]

DIR holds cifar-10-batches-py. The three take turns, round by round, so that a busy minute of the machine slows them all. torchvision
has two workers that persist, and the usual transforms: RandomCrop (reflect), RandomHorizontalFlip, ToTensor, Normalize.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from clock import DEVICE, ON_GPU, quantiles, synchronize

from fastvid import datasets
from fastvid.config import TrainConfig
from fastvid.loader import BACKENDS, train_loader
from fastvid.methods import build
from fastvid.plan import BatchPlan
from fastvid.step import GroupStep
from fastvid.student import Student
from fastvid.wresnet import WideResNet

BATCH = 128


@pytest.fixture(scope="module")
def data(pytestconfig):
    """The folder of --data."""
    folder = pytestconfig.option.data
    if folder is None or not datasets.located("cifar10", folder):
        pytest.skip("no CIFAR-10: give the folder of cifar-10-batches-py as --data")
    return folder


@pytest.fixture(scope="module")
def arrays(data):
    return datasets.load("cifar10", data, "train")


def row(op: str, impl: str, wall_us: list[float], **more) -> dict:
    return {
        "op": op,
        "tap": "cifar10",
        "shape": f"{BATCH}x3x32x32",
        "dtype": "fp32",
        "impl": impl,
        "pass": "batch",
        "launch": "host",
        "on": DEVICE.type,
        "gpu_us": None,
        "wall_us": wall_us,
    } | more


def ours(arrays: datasets.Arrays, backend: str, batches: int) -> Callable[[], None]:
    """A round: so many batches, epoch after epoch, from one loader that is warm."""
    plan = BatchPlan(len(arrays), BATCH, seed=0)
    loader = train_loader(arrays, plan, backend=backend, device=DEVICE)
    stream = (batch for epoch in range(10**6) for batch in loader.epoch(epoch))
    return lambda: [next(stream) for _ in range(batches)][-1]


def torchvisions(data: str, arrays: datasets.Arrays, batches: int) -> Callable[[], None]:
    import torchvision
    from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor

    transform = Compose(
        [
            RandomCrop(32, 4, padding_mode="reflect"),
            RandomHorizontalFlip(),
            ToTensor(),
            Normalize(arrays.mean, arrays.std),
        ]
    )
    images = torchvision.datasets.CIFAR10(data, train=True, transform=transform)
    loader = torch.utils.data.DataLoader(
        images, BATCH, shuffle=True, num_workers=2, persistent_workers=True, pin_memory=ON_GPU
    )

    def batch_after_batch():
        while True:
            for images, labels in loader:
                yield images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)

    stream = batch_after_batch()
    return lambda: [next(stream) for _ in range(batches)][-1]


def test_images_per_second(data, arrays, pytestconfig, record):
    quick = pytestconfig.option.quick
    fast, slow, rounds = (
        (40, 4, 2) if quick else (800, 100, 9)
    )  # batches in a round of ours, and of torchvision's
    loaders = {name: (ours(arrays, name, fast), fast) for name in BACKENDS} | {
        "torchvision": (torchvisions(data, arrays, slow), slow)
    }
    times = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name, (take, batches) in loaders.items():
            synchronize()
            time.sleep(
                0.3
            )  # what the last one prefetches shall not disturb this one; torchvision starts with 4 of 100 batches made
            started = time.perf_counter()
            take()
            synchronize()
            if number:  # the first round warms up
                times[name].append(1e6 * (time.perf_counter() - started) / batches)
    middle = {name: quantiles(values) for name, values in times.items()}
    for name, wall_us in middle.items():
        record(
            row(
                "loader",
                name,
                wall_us,
                images_per_s=round(1e6 * BATCH / wall_us[0]),
                of_torchvision=middle["torchvision"][0] / wall_us[0],
            )
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_costs_the_same_however_many_there_are(arrays, backend, pytestconfig, record):
    """20 images of each class: an epoch has two batches. The first hundred epochs beside the last hundred."""
    subset, epochs = arrays.subset(20), 300 if pytestconfig.option.quick else 3000
    loader = train_loader(subset, BatchPlan(len(subset), BATCH, seed=0), backend=backend, device=DEVICE)
    times = []
    for epoch in range(epochs):
        started = time.perf_counter()
        for batch in loader.epoch(epoch):
            pass
        synchronize()
        times.append(1e6 * (time.perf_counter() - started))
    first, last = quantiles(times[10:110]), quantiles(times[-100:])
    record(row("epoch", backend, last, epochs=epochs, first_us=first, last_of_first=last[0] / first[0]))


START = """
import sys, time
started = time.perf_counter()
from fastvid import datasets, loader, plan
import torch
if sys.argv[2] == "dali":
    import nvidia.dali.fn
imported = time.perf_counter()
arrays = datasets.load("cifar10", sys.argv[1], "train")
loaded = time.perf_counter()
batches = plan.BatchPlan(len(arrays), 128, seed=0)
images, labels = next(iter(loader.train_loader(arrays, batches, backend=sys.argv[2], device=sys.argv[3]).epoch(0)))
images.sum().item()
print(loaded - imported, time.perf_counter() - imported, imported - started)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_start_up(data, arrays, backend, pytestconfig, record):
    """From the cached files to the first batch, in a new process; the fixture has made the cache."""
    rounds = []
    for _ in range(1 if pytestconfig.option.quick else 5):
        command = [sys.executable, "-c", START, str(data), backend, DEVICE.type]
        rounds.append(
            [
                float(text)
                for text in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            ]
        )
    load, total, imports = ([1e6 * value for value in values] for values in zip(*rounds))
    record(row("start", backend, quantiles(total), load_us=quantiles(load), import_us=quantiles(imports)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_of_the_loader_a_vid_step_has_to_wait_for(arrays, backend, pytestconfig, record):
    """Steps on batches as they come and on one batch that lies there, in turns."""
    count, rounds = (2, 1) if pytestconfig.option.quick else (100, 7) if ON_GPU else (4, 7)
    torch.manual_seed(0)
    config = TrainConfig(method=("vid",), batch_size=BATCH).resolved()
    teacher, student = WideResNet(40, 2).eval(), WideResNet(16, 1)
    one = Student("vid", student, build("vid", config, student, teacher), config, DEVICE)
    step = GroupStep(teacher, [one], DEVICE, config.precision)
    step.begin_epoch(0.0)
    take = ours(arrays, backend, 1)
    images, labels = (tensor.clone() for tensor in take())
    times = {"loaded": [], "static": []}
    for number in range(rounds + 1):
        for kind, values in times.items():
            synchronize()
            started = time.perf_counter()
            for _ in range(count):
                step(*(take() if kind == "loaded" else (images, labels)), 0.01)
            synchronize()
            if number:
                values.append(1e6 * (time.perf_counter() - started) / count)
    loaded, static = (quantiles(values) for values in times.values())
    record(row("vid_step", backend, loaded, static_us=static, exposed=loaded[0] / static[0] - 1))
