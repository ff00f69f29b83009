"""Speed of the loaders on CIFAR-10: fastvid with DALI, fastvid with torch, and torchvision, in one run.

    python -m pytest bench/test_loader.py --data DIR [--rows FILE.jsonl] [--quick]

DIR holds cifar-10-batches-py. The three loaders take turns in each round, so that other load on the machine
slows all of them. The DataLoader of torchvision has two persistent workers and the usual transforms:
RandomCrop (reflect), RandomHorizontalFlip, ToTensor, Normalize.
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
    folder = pytestconfig.option.data
    if folder is None or not datasets.located("cifar10", folder):
        pytest.skip("no CIFAR-10: give the folder of cifar-10-batches-py as --data")
    return folder


@pytest.fixture(scope="module")
def arrays(data):
    return datasets.load("cifar10", data, "train")


def row(op: str, impl: str, wall_us: list[float], **more) -> dict:
    kind = {"op": op, "tap": "cifar10", "shape": f"{BATCH}x3x32x32", "dtype": "fp32", "impl": impl}
    kind |= {"pass": "batch", "launch": "host", "on": DEVICE.type, "gpu_us": None, "wall_us": wall_us}
    return kind | more


def ours(arrays: datasets.Arrays, backend: str, batches: int) -> Callable[[], None]:
    """A function that takes the next `batches` batches from one loader of fastvid."""
    plan = BatchPlan(len(arrays), BATCH, seed=0)
    loader = train_loader(arrays, plan, backend=backend, device=DEVICE)
    stream = (batch for epoch in range(10**6) for batch in loader.epoch(epoch))
    return lambda: [next(stream) for _ in range(batches)][-1]


def torchvisions(data: str, arrays: datasets.Arrays, batches: int) -> Callable[[], None]:
    """A function that takes the next `batches` batches from the DataLoader of torchvision's CIFAR-10."""
    import torchvision
    from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor

    crop, normalise = RandomCrop(32, 4, padding_mode="reflect"), Normalize(arrays.mean, arrays.std)
    transform = Compose([crop, RandomHorizontalFlip(), ToTensor(), normalise])
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
    # batches per round of the loaders of fastvid, and of torchvision
    fast, slow, rounds = (40, 4, 2) if quick else (800, 100, 9)
    loaders = {name: (ours(arrays, name, fast), fast) for name in BACKENDS}
    loaders["torchvision"] = torchvisions(data, arrays, slow), slow
    times = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name, (take, batches) in loaders.items():
            synchronize()
            # The previous loader finishes its prefetching. torchvision has then prefetched 4 of 100 batches.
            time.sleep(0.3)
            started = time.perf_counter()
            take()
            synchronize()
            if number:  # the first round is the warm-up
                times[name].append(1e6 * (time.perf_counter() - started) / batches)
    middle = {name: quantiles(values) for name, values in times.items()}
    for name, wall_us in middle.items():
        images_per_s, ratio = round(1e6 * BATCH / wall_us[0]), middle["torchvision"][0] / wall_us[0]
        record(row("loader", name, wall_us, images_per_s=images_per_s, of_torchvision=ratio))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_costs_the_same_however_many_there_are(arrays, backend, pytestconfig, record):
    """An epoch has two batches, from 20 images of each class. Compares the first and the last 100 epochs."""
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
loader = loader.train_loader(arrays, batches, backend=sys.argv[2], device=sys.argv[3])
images, labels = next(iter(loader.epoch(0)))
images.sum().item()
print(loaded - imported, time.perf_counter() - imported, imported - started)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_start_up(data, arrays, backend, pytestconfig, record):
    """Time from the cached files to the first batch, in a new process. The fixture has created the cache."""
    command, rounds = [sys.executable, "-c", START, str(data), backend, DEVICE.type], []
    for _ in range(1 if pytestconfig.option.quick else 5):
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rounds.append(list(map(float, printed.split())))
    load, total, imports = ([1e6 * value for value in values] for values in zip(*rounds))
    record(row("start", backend, quantiles(total), load_us=quantiles(load), import_us=quantiles(imports)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_time_that_a_vid_step_waits_for_the_loader(arrays, backend, pytestconfig, record):
    """Alternates between steps on batches of the loader and steps on one static batch."""
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
