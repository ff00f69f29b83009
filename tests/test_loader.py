"""Batches are what the plan says, to the same bits by both executors, from any step on."""

import dataclasses
import gc
import itertools
import os
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from fastvid.datasets import Arrays
from fastvid.errors import InputError
from fastvid.loader import (
    BACKENDS,
    EvalLoader,
    choose_backend,
    dali_executor,
    dali_is_installed,
    describe,
    train_loader,
)
from fastvid.plan import BatchPlan

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@pytest.fixture
def noise():
    """30 images of noise."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8)
    return Arrays(images, random.integers(0, 10, 30), tuple("0123456789"), MEAN, STD)


@pytest.fixture
def coordinates():
    """30 images whose pixels hold (row, column, number of the image); the label is the number too."""
    images = np.empty((30, 32, 32, 3), np.uint8)
    images[..., 0], images[..., 1] = np.arange(32)[:, None], np.arange(32)
    images[..., 2] = np.arange(30)[:, None, None]
    return Arrays(images, np.arange(30), tuple(map(str, range(30))), (0.0,) * 3, (1 / 255,) * 3)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each executor of the plan."""
    if request.param == "dali" and not dali_is_installed():
        pytest.skip("DALI is not installed")
    return request.param


needs_dali = pytest.mark.skipif(not dali_is_installed(), reason="DALI is not installed")


def batches(loader, *epochs):
    return [batch for epoch in epochs for batch in loader.epoch(epoch)]


def same_bits(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for one, other in zip(ours, theirs) for a, b in zip(one, other)
    )


def of_both(arrays, plan, *epochs, **options):
    """The batches of each executor."""
    return [batches(train_loader(arrays, plan, backend=name, **options), *epochs) for name in BACKENDS]


def assert_normalised(images, pixels):
    """`images` is (pixels/255 - mean)/std but for rounding.

    In fp32 the loader rounds 255·mean, its difference to the pixel, 255·std, its reciprocal and the product.
    With u = 2^-24 the error is at most u·mean/std + 4u·|result|, to first order; 5u instead of 4u covers the
    second. DALI's multiply-add on a GPU rounds 255·std, its reciprocal, the offset (twice, with 255·mean) and
    the sum: 4u·mean/std + 3u·|result|, and |pixel·scale| counts as result.
    """
    mean, std = np.array(MEAN), np.array(STD)
    expected = (pixels / 255 - mean) / std
    error = np.abs(images.double().permute(0, 2, 3, 1).cpu().numpy() - expected)
    fused = 5 if images.is_cuda else 1
    assert (error <= 2.0**-24 * (fused * mean / std + 5 * np.abs(expected))).all()


# --- one batch


def test_a_batch_is_what_a_slow_pad_crop_flip_normalise_gives(noise, device, backend):
    plan = BatchPlan(30, 12, seed=1)
    loader = train_loader(noise, plan, device=device, backend=backend)
    for step in range(3):
        images, labels = loader.batch(2, step)
        chosen, pixels = plan.batch(2, step), []
        for index, top, left, flip in zip(*chosen):
            padded = np.pad(noise.images[index], ((4, 4), (4, 4), (0, 0)), mode="reflect")
            crop = padded[top : top + 32, left : left + 32]
            pixels.append(crop[:, ::-1] if flip else crop)
        assert_normalised(images, np.stack(pixels))
        assert labels.tolist() == noise.labels[chosen.indices].tolist() and labels.dtype == torch.int64
        assert images.device.type == labels.device.type == device


def test_crops_start_exactly_at_the_planned_pixel_and_flips_mirror_columns_only(coordinates, backend):
    def source(position):
        """Row or column that reflection without repeating the edge shows at a position outside 0..31."""
        position = np.abs(position)
        return np.where(position > 31, 62 - position, position)

    plan = BatchPlan(30, 30, seed=0)
    loader, seen = train_loader(coordinates, plan, backend=backend), set()
    for epoch in range(60):  # 1,800 draws of 162 combinations
        images, labels = loader.batch(epoch, 0)
        rows, columns, number = images.round().int().unbind(1)
        indices, top, left, flip = plan.batch(epoch, 0)
        walk = np.where(flip[:, None], np.arange(31, -1, -1), np.arange(32))
        assert (rows.numpy() == source(top[:, None] + np.arange(32) - 4)[:, :, None]).all()
        assert (columns.numpy() == source(left[:, None] + walk - 4)[:, None, :]).all()
        assert (number.numpy() == indices[:, None, None]).all() and labels.tolist() == indices.tolist()
        seen |= set(zip(top, left, flip))
    # Of 81 offsets with and without a flip, 1 - (1 - 1/162)^1800 = 0.99999 are expected. The seed is fixed.
    assert len(seen) == 162


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_images_are_channels_last_views_of_the_wanted_type_rounded_once(dtype, noise, backend):
    plan = BatchPlan(30, 8, seed=0)
    for loaders in (
        lambda d: train_loader(noise, plan, dtype=d, backend=backend).epoch(0),
        lambda d: EvalLoader(noise, 8, dtype=d),
    ):
        for (images, _), (exact, _) in zip(loaders(dtype), loaders(torch.float32), strict=True):
            assert images.dtype == (dtype or torch.float32)
            assert images.stride() == (3072, 1, 96, 3)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(images, exact.to(images.dtype))


def test_evaluation_shows_every_image_once_in_order_unaugmented(noise, device):
    found = list(EvalLoader(noise, 12, device=device))
    assert [len(labels) for _, labels in found] == [12, 12, 6]
    images, labels = (torch.cat(values) for values in zip(*found))
    assert_normalised(images, noise.images)
    assert labels.tolist() == noise.labels.tolist()


# --- DALI beside torch


@needs_dali
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 29, 64])
def test_dali_and_torch_give_the_same_bits(noise, batch_size, world_size):
    for seed, rank in itertools.product((0, 2**63), range(world_size)):
        # Of 30 images in batches of 29, the last batch has one image: two ranks of three get none.
        plan = BatchPlan(30, batch_size, seed=seed, rank=rank, world_size=world_size)
        ours, theirs = of_both(noise, plan, 0, 1, 5)
        assert same_bits(ours, theirs) and all(images.dtype == torch.float32 for images, _ in ours)


@needs_dali
def test_dali_and_torch_give_the_same_bits_whatever_the_constants(noise):
    random, plan = np.random.default_rng(0), BatchPlan(30, 30, seed=0)
    cifar100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    folders = [
        (tuple(random.uniform(0.05, 0.9, 3).round(4)), tuple(random.uniform(0.02, 0.4, 3).round(4)))
        for _ in range(40)
    ]
    for mean, std in [cifar100, *folders]:
        assert same_bits(*of_both(dataclasses.replace(noise, mean=mean, std=std), plan, 0)), (mean, std)


@needs_dali
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_dali_and_torch_round_to_half_precision_alike(noise, precision):
    assert same_bits(*of_both(noise, BatchPlan(30, 8, seed=0), 0, dtype=precision))


@needs_dali
@pytest.mark.gpu
def test_on_a_gpu_dali_and_torch_differ_by_the_rounding_of_a_multiply_add_only(noise):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    bound = 2.0**-23 * (max(MEAN) + 1) / min(STD) * 4  # one level is 1/255/std
    for batch_size, world_size in [(1, 1), (7, 2), (29, 3), (30, 1)]:
        for rank in range(world_size):
            plan = BatchPlan(30, batch_size, seed=3, rank=rank, world_size=world_size)
            dali, plain = (train_loader(noise, plan, backend=name, device="cuda") for name in BACKENDS)
            torch.cuda._sleep(10**8)  # behind a busy stream, nothing may be read before it is written
            for ours, theirs in zip(batches(dali, 0, 1, 5), batches(plain, 0, 1, 5), strict=True):
                assert torch.equal(ours.labels, theirs.labels) and ours.images.shape == theirs.images.shape
                assert not len(ours.labels) or (ours.images - theirs.images).abs().amax() < bound


# --- a whole run


def test_every_rank_loads_its_part_of_the_batch_and_the_short_last_batch_is_kept(coordinates, backend):
    whole, *ranks = (
        train_loader(coordinates, BatchPlan(30, 8, seed=0, **share), backend=backend).epoch(0)
        for share in ({}, {"rank": 0, "world_size": 2}, {"rank": 1, "world_size": 2})
    )
    sizes = []
    for batch, one, other in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images[0::2], one.images) and torch.equal(batch.images[1::2], other.images)
        sizes.append(len(batch.labels))
    assert sizes == [8, 8, 8, 6]


def test_epochs_in_any_order_abandoned_or_begun_in_the_middle_give_their_batches(noise, device, backend):
    plan = BatchPlan(30, 8, seed=0)
    loader, fresh = (train_loader(noise, plan, backend=backend, device=device) for _ in range(2))
    for epoch, start, count in [
        (3, 0, 4),
        (3, 0, 2),
        (3, 2, 1),
        (0, 1, 1),
        (1, 3, 1),
        (2, 0, 4),
        (10**9, 0, 1),
    ]:
        taken = [batch for batch, _ in zip(loader.epoch(epoch, start), range(count))]
        single = [fresh.batch(epoch, step) for step in range(start, start + count)]
        assert same_bits(taken, single), (epoch, start)


def test_batches_that_are_kept_stay_as_they_were_and_may_be_overwritten(noise, device, backend):
    loader = train_loader(noise, BatchPlan(30, 8, seed=0), backend=backend, device=device)
    kept = batches(loader, *range(20))
    copies = [[tensor.clone() for tensor in batch] for batch in kept]
    batches(loader, *range(20, 40))
    assert same_bits(kept, copies)
    for images, labels in batches(loader, 0):
        images.zero_()
        labels.zero_()
    assert same_bits(batches(loader, *range(20)), copies)


PROGRAM = """
import hashlib, sys
import numpy as np
from fastvid.datasets import Arrays
from fastvid.loader import train_loader
from fastvid.plan import BatchPlan
random = np.random.default_rng(0)
images = random.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8)
arrays = Arrays(images, random.integers(0, 10, 30), tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)
loader = train_loader(arrays, BatchPlan(30, 8, seed=0), backend=sys.argv[1])
for epoch, start in ((4, int(sys.argv[2])), (5, 0)):
    for images, labels in loader.epoch(epoch, start):
        print(hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest())
"""


def test_a_new_process_goes_on_with_the_batches_that_the_old_one_would_have_had(backend):
    def run(start):
        command = [sys.executable, "-c", PROGRAM, backend, str(start)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    whole = run(0)
    assert len(whole) == 8 and run(3) == whole[3:]


def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def threads():
    return len(os.listdir("/proc/self/task"))


@needs_dali
def test_a_thousand_epochs_leak_neither_memory_nor_threads_and_nothing_is_rebuilt(noise, monkeypatch):
    built, build = [], dali_executor._build_pipeline
    monkeypatch.setattr(dali_executor, "_build_pipeline", lambda *args: built.append(1) or build(*args))
    gc.collect()
    before = threads()
    loader = train_loader(noise, BatchPlan(30, 8, seed=0), backend="dali")
    for epoch in range(1000):
        batches(loader, epoch)
        if epoch == 199:  # warm
            memory, running = resident_mb(), threads()
    assert built == [1] and threads() == running > before
    assert resident_mb() - memory < 4  # a leaked batch of 96 KB in each of the 3,200 would be 300 MB
    gc.disable()
    try:
        del loader
        assert threads() <= before, (
            "the pipeline's threads outlive the loader, or wait for the garbage collector"
        )
    finally:
        gc.enable()


def test_two_threads_may_share_a_loader_and_build_their_own(noise, backend):
    plan, found = BatchPlan(30, 8, seed=0), {}
    loader = train_loader(noise, plan, backend=backend)

    def work(epoch):
        found[epoch] = batches(loader, epoch)
        found[-epoch] = batches(train_loader(noise, plan, backend=backend), epoch)

    workers = [threading.Thread(target=work, args=(epoch,)) for epoch in (1, 2)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert all(same_bits(found[epoch], batches(loader, abs(epoch))) for epoch in (1, 2, -1, -2))


# --- borders


@pytest.mark.parametrize("epoch, step", [(0, -1), (-1, 0), (0, 5)])
def test_an_epoch_or_step_that_does_not_exist_is_refused_and_the_loader_goes_on(noise, backend, epoch, step):
    loader = train_loader(noise, BatchPlan(30, 8, seed=0), backend=backend)
    first = batches(loader, 0)
    for ask in (loader.epoch, loader.batch):
        with pytest.raises(IndexError, match=f"no step {step} of epoch {epoch}: an epoch has 4 steps"):
            ask(epoch, step)
    with pytest.raises(IndexError, match="no step 4"):
        loader.batch(0, 4)
    assert list(loader.epoch(0, 4)) == [] and same_bits(batches(loader, 0), first)


def test_auto_takes_dali_where_it_is_installed_and_says_which_runs(noise, monkeypatch):
    if dali_is_installed():
        assert choose_backend("auto") == "dali" and describe("auto").startswith("dali 2")
        assert describe("torch") == "torch"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert choose_backend("auto") == "torch" and describe("auto") == "torch (DALI is not installed)"
    with pytest.raises(
        InputError, match="needs DALI: pip install nvidia-dali-cuda130 .* or take --loader torch"
    ):
        choose_backend("dali")
    with pytest.raises(InputError, match="unknown loader 'turbo': choose from auto, dali, torch"):
        train_loader(noise, BatchPlan(30, 8, seed=0), backend="turbo")


@needs_dali
def test_a_dali_that_cannot_be_imported_or_started_ends_in_one_line_with_the_remedy(noise, monkeypatch):
    plan, (fn, _, types) = BatchPlan(30, 8, seed=0), dali_executor.dali()

    def failing():
        raise RuntimeError("CUDA driver version is insufficient\nStacktrace")

    def refused(**_):
        return lambda define: lambda: SimpleNamespace(build=failing)

    with monkeypatch.context() as patch:
        patch.setattr(dali_executor, "dali", lambda: (fn, refused, types))
        message = r"DALI cannot run on cpu \(CUDA driver version is insufficient\): take --loader torch"
        with pytest.raises(InputError, match=message):
            train_loader(noise, plan, backend="dali")
    monkeypatch.setitem(sys.modules, "nvidia.dali", ModuleType("nvidia.dali"))  # installed, and empty
    message = r"DALI is installed but cannot be imported \(cannot import name .*take --loader torch"
    with pytest.raises(InputError, match=message):
        train_loader(noise, plan, backend="auto")


def test_arrays_of_another_length_size_or_type_and_integer_images_are_refused(noise, backend):
    def refused(message, images=noise.images, plan=30, **options):
        arrays = dataclasses.replace(noise, images=images)
        with pytest.raises(ValueError, match=message):
            train_loader(arrays, BatchPlan(plan, 8, seed=0), backend=backend, **options)

    refused("the plan is for 29 images, the arrays hold 30", plan=29)
    for images in (np.zeros((30, 28, 28, 3), np.uint8), np.zeros((30, 32, 32, 3), np.float32)):
        refused(r"train_loader wants images uint8 \[n, 32, 32, 3\], but they are", images)
    refused("dtype of images is torch.int32, wanted a floating-point type", dtype=torch.int32)
    with pytest.raises(ValueError, match="dtype of images is torch.int32, wanted a floating-point type"):
        EvalLoader(noise, 8, dtype=torch.int32)
