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

from fastvid import loader as loader_module
from fastvid.datasets import Arrays
from fastvid.errors import InputError
from fastvid.loader import BACKENDS, EvalLoader, choose_backend, dali_is_installed, describe, train_loader
from fastvid.plan import BatchPlan

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@pytest.fixture
def noise():
    """30 images of noise."""
    random = np.random.default_rng(0)
    return Arrays(
        random.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8),
        random.integers(0, 10, 30),
        tuple("0123456789"),
        MEAN,
        STD,
    )


@pytest.fixture
def coordinates():
    """30 images whose pixels hold (row, column, number of the image), not normalised; the label is the number too."""
    images = np.empty((30, 32, 32, 3), np.uint8)
    images[..., 0], images[..., 1] = np.arange(32)[:, None], np.arange(32)
    images[..., 2] = np.arange(30)[:, None, None]
    return Arrays(
        images, np.arange(30), tuple(map(str, range(30))), (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
    )


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each executor of the plan."""
    if request.param == "dali" and not dali_is_installed():
        pytest.skip("DALI is not installed")
    return request.param


needs_dali = pytest.mark.skipif(not dali_is_installed(), reason="DALI is not installed")


def assert_normalised(images, pixels):
    """`images` is (pixels/255 - mean)/std but for rounding.

    In fp32 the loader rounds 255·mean, its difference to the pixel, 255·std, its reciprocal and the product: with u = 2^-24 the error
    is at most u·mean/std + 4u·|result|, to first order. 5u instead of 4u covers the second. DALI's multiply-add on a GPU rounds
    255·std, its reciprocal, the offset (twice, with 255·mean) and the sum: 4u·mean/std + 3u·|result|, and |pixel·scale| counts as result.
    """
    mean, std = np.array(MEAN), np.array(STD)
    expected = (pixels / 255 - mean) / std
    error = np.abs(images.double().permute(0, 2, 3, 1).cpu().numpy() - expected)
    fused = 5 if images.is_cuda else 1
    assert (error <= 2.0**-24 * (fused * mean / std + 5 * np.abs(expected))).all()


def test_a_batch_is_what_a_slow_pad_crop_flip_normalise_gives(noise, device, backend):
    plan = BatchPlan(30, 12, seed=1)
    for step, (images, labels) in enumerate(
        train_loader(noise, plan, device=device, backend=backend).epoch(2)
    ):
        chosen = plan.batch(2, step)
        pixels = []
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
        ((images, labels),) = loader.epoch(epoch)
        rows, columns, number = images.round().int().unbind(1)
        indices, top, left, flip = plan.batch(epoch, 0)
        walk = np.where(flip[:, None], np.arange(31, -1, -1), np.arange(32))
        assert (rows.numpy() == source(top[:, None] + np.arange(32) - 4)[:, :, None]).all()
        assert (columns.numpy() == source(left[:, None] + walk - 4)[:, None, :]).all()
        assert (number.numpy() == indices[:, None, None]).all() and labels.tolist() == indices.tolist()
        seen |= set(zip(top, left, flip))
    # each of the 81 offsets with and without a flip: 1 - (1 - 1/162)^1800 = 0.99999 of them are expected, and the seed is fixed
    assert len(seen) == 162


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_images_are_channels_last_views_of_the_wanted_type_rounded_once(dtype, noise, backend):
    plan = BatchPlan(30, 8, seed=0)
    for loaders in (
        lambda d: train_loader(noise, plan, dtype=d, backend=backend).epoch(0),
        lambda d: EvalLoader(noise, 8, dtype=d),
    ):
        for (images, _), (exact, _) in zip(loaders(dtype), loaders(torch.float32), strict=True):
            assert images.dtype == (dtype or torch.float32)
            assert images.stride() == (3072, 1, 96, 3) and images.is_contiguous(
                memory_format=torch.channels_last
            )
            assert torch.equal(images, exact.to(images.dtype))


def test_the_short_last_batch_is_kept(noise, backend):
    sizes = [
        len(labels) for _, labels in train_loader(noise, BatchPlan(30, 8, seed=0), backend=backend).epoch(0)
    ]
    assert sizes == [8, 8, 8, 6]


def test_starting_in_the_middle_of_an_epoch_gives_the_batches_that_were_left(noise, backend):
    loader = train_loader(noise, BatchPlan(30, 8, seed=0), backend=backend)
    whole, rest = list(loader.epoch(3)), list(loader.epoch(3, start_step=2))
    assert len(rest) == 2
    assert all(torch.equal(a, b) for one, other in zip(whole[2:], rest) for a, b in zip(one, other))


def test_each_rank_loads_its_part_of_the_batch(coordinates, backend):
    whole, *ranks = (
        train_loader(coordinates, BatchPlan(30, 8, seed=0, **share), backend=backend).epoch(0)
        for share in ({}, {"rank": 0, "world_size": 2}, {"rank": 1, "world_size": 2})
    )
    for batch, one, other in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images[0::2], one.images) and torch.equal(batch.images[1::2], other.images)


def test_evaluation_shows_every_image_once_in_order_unaugmented(noise, device):
    batches = list(EvalLoader(noise, 12, device=device))
    assert [len(labels) for _, labels in batches] == [12, 12, 6]
    images, labels = (torch.cat(values) for values in zip(*batches))
    assert_normalised(images, noise.images)
    assert labels.tolist() == noise.labels.tolist()


def test_normalised_cifar10_has_mean_0_and_standard_deviation_1(cifar10_train):
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for images, _ in EvalLoader(cifar10_train, 1000):
        images = images.double()
        sums += torch.stack((images.sum(dim=(0, 2, 3)), images.square().sum(dim=(0, 2, 3))))
    mean, squares = sums / (50_000 * 32 * 32)
    # mean and std are published with 4 digits: off by at most 0.00005, which is divided by the least std, 0.2435
    tolerance = 0.00005 / 0.2435 + 1e-6
    assert mean.abs().max() < tolerance
    assert ((squares - mean.square()).sqrt() - 1).abs().max() < tolerance


# --- DALI beside torch


def batches(loader, *epochs, start_step=0):
    return [batch for epoch in epochs for batch in loader.epoch(epoch, start_step)]


def same_bits(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for one, other in zip(ours, theirs) for a, b in zip(one, other)
    )


@needs_dali
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 29, 30, 64])
def test_dali_and_torch_give_the_same_bits(noise, batch_size, world_size):
    for seed in (0, 3, 2**63):
        for rank in range(
            world_size
        ):  # of 30 images in batches of 29, the last one has one image: two ranks of three get none
            plan = BatchPlan(30, batch_size, seed=seed, rank=rank, world_size=world_size)
            ours, theirs = (batches(train_loader(noise, plan, backend=name), 0, 1, 5) for name in BACKENDS)
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
        arrays = dataclasses.replace(noise, mean=mean, std=std)
        assert same_bits(*(batches(train_loader(arrays, plan, backend=name), 0) for name in BACKENDS)), (
            mean,
            std,
        )


@needs_dali
@pytest.mark.gpu
def test_on_a_gpu_dali_and_torch_give_the_same_labels_and_pixels_and_differ_by_the_rounding_of_a_multiply_add(
    noise,
):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    bound = 2.0**-23 * (max(MEAN) + 1) / min(STD) * 4
    for batch_size, world_size in [(1, 1), (7, 2), (29, 3), (30, 1)]:
        for rank in range(world_size):
            plan = BatchPlan(30, batch_size, seed=3, rank=rank, world_size=world_size)
            dali, plain = (train_loader(noise, plan, backend=name, device="cuda") for name in BACKENDS)
            torch.cuda._sleep(
                10**8
            )  # the loader's work starts behind a busy stream, and nothing may be read before it is written
            for ours, theirs in zip(batches(dali, 0, 1, 5), batches(plain, 0, 1, 5), strict=True):
                assert torch.equal(ours.labels, theirs.labels) and ours.images.shape == theirs.images.shape
                assert (
                    (ours.images - theirs.images).abs().amax() < bound if len(ours.labels) else True
                )  # one level is 1/255/std


@needs_dali
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_dali_and_torch_round_to_half_precision_alike(noise, precision):
    plan = BatchPlan(30, 8, seed=0)
    ours, theirs = (batches(train_loader(noise, plan, backend=name, dtype=precision), 0) for name in BACKENDS)
    assert same_bits(ours, theirs) and ours[0].images.dtype == precision


def test_epochs_in_any_order_abandoned_or_begun_in_the_middle_give_their_batches(noise, device, backend):
    plan = BatchPlan(30, 8, seed=0)
    loader, fresh = (
        train_loader(noise, plan, backend=backend, device=device),
        train_loader(noise, plan, backend=backend, device=device),
    )
    for epoch, start, count in [
        (3, 0, 4),
        (3, 0, 2),
        (3, 2, 1),
        (0, 1, 1),
        (1, 3, 1),
        (2, 0, 4),
        (3, 0, 4),
        (3, 3, 1),
        (10**9, 0, 1),
    ]:
        taken = [batch for batch, _ in zip(loader.epoch(epoch, start), range(count))]
        whole = [
            batch
            for step in range(start, start + count)
            for batch in itertools.islice(fresh.epoch(epoch, step), 1)
        ]
        assert same_bits(taken, whole), (epoch, start)


def test_batches_that_are_kept_stay_as_they_were(noise, device, backend):
    loader = train_loader(noise, BatchPlan(30, 8, seed=0), backend=backend, device=device)
    kept = batches(loader, *range(20))
    copies = [[tensor.clone() for tensor in batch] for batch in kept]
    batches(loader, *range(20, 40))
    assert same_bits(kept, copies)


def test_a_batch_may_be_overwritten(noise, backend):
    loader = train_loader(noise, BatchPlan(30, 8, seed=0), backend=backend)
    before = [[tensor.clone() for tensor in batch] for batch in loader.epoch(0)]
    for images, labels in loader.epoch(0):
        images.zero_()
        labels.zero_()
    assert same_bits(batches(loader, 0), before)


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


@pytest.mark.parametrize("step", [1, 3])
def test_a_new_process_goes_on_with_the_batches_that_the_old_one_would_have_had(backend, step):
    def run(start):
        command = [sys.executable, "-c", PROGRAM, backend, str(start)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    whole = run(0)
    assert len(whole) == 8 and run(step) == whole[step:]


def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@needs_dali
def test_a_thousand_epochs_leak_neither_memory_nor_threads_and_nothing_is_rebuilt(noise, monkeypatch):
    built, build = [], loader_module._build_pipeline
    monkeypatch.setattr(loader_module, "_build_pipeline", lambda *args: built.append(1) or build(*args))
    gc.collect()
    threads = len(os.listdir("/proc/self/task"))
    loader = train_loader(noise, BatchPlan(30, 8, seed=0), backend="dali")
    for epoch in range(1000):
        batches(loader, epoch)
        if epoch == 199:  # warm
            memory, running = resident_mb(), len(os.listdir("/proc/self/task"))
    assert built == [1] and len(os.listdir("/proc/self/task")) == running
    assert resident_mb() - memory < 4  # a leaked batch of 96 KB in each of the 3,200 would be 300 MB
    del loader
    gc.collect()
    assert len(os.listdir("/proc/self/task")) <= threads, "the pipeline's threads outlive the loader"


@needs_dali
def test_a_loader_that_nobody_uses_any_more_goes_without_the_garbage_collector(noise):
    gc.collect()
    threads = len(os.listdir("/proc/self/task"))
    gc.disable()
    try:
        loader = train_loader(noise, BatchPlan(30, 8, seed=0), backend="dali")
        batches(loader, 0)
        assert len(os.listdir("/proc/self/task")) > threads
        del loader
        assert len(os.listdir("/proc/self/task")) <= threads
    finally:
        gc.enable()


def test_two_threads_may_share_a_loader(noise, backend):
    loader, found = train_loader(noise, BatchPlan(30, 8, seed=0), backend=backend), {}
    threads = [
        threading.Thread(target=lambda epoch=epoch: found.update({epoch: batches(loader, epoch)}))
        for epoch in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(found[epoch], batches(loader, epoch)) for epoch in (1, 2))


@pytest.mark.parametrize("epoch, step", [(0, -1), (-1, 0), (0, 5)])
def test_an_epoch_or_step_that_does_not_exist_is_refused_and_the_loader_goes_on(noise, backend, epoch, step):
    loader = train_loader(noise, BatchPlan(30, 8, seed=0), backend=backend)
    first = batches(loader, 0)
    with pytest.raises(IndexError, match=f"no step {step} of epoch {epoch}: an epoch has 4 steps"):
        loader.epoch(epoch, step)
    assert list(loader.epoch(0, 4)) == [] and same_bits(batches(loader, 0), first)


def test_a_loader_works_outside_the_main_thread(noise, backend):
    plan, found = BatchPlan(30, 8, seed=0), []
    thread = threading.Thread(
        target=lambda: found.extend(batches(train_loader(noise, plan, backend=backend), 0))
    )
    thread.start()
    thread.join()
    assert same_bits(found, batches(train_loader(noise, plan, backend=backend), 0))


def test_auto_takes_dali_where_it_is_installed_and_says_which_runs(monkeypatch):
    if dali_is_installed():
        assert (
            choose_backend("auto") == "dali"
            and describe("auto").startswith("dali ")
            and describe("torch") == "torch"
        )
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert choose_backend("auto") == "torch" and describe("auto") == "torch (DALI is not installed)"
    with pytest.raises(
        InputError,
        match="--loader dali needs DALI: pip install nvidia-dali-cuda130 .* or take --loader torch",
    ):
        choose_backend("dali")


@needs_dali
def test_a_dali_that_cannot_be_imported_or_started_ends_in_one_line_with_the_remedy(noise, monkeypatch):
    plan = BatchPlan(30, 8, seed=0)
    with monkeypatch.context() as patch:
        fn, _, types = loader_module.dali()

        def refused(**_):
            return lambda define: lambda: SimpleNamespace(build=failing)

        def failing():
            raise RuntimeError("CUDA driver version is insufficient\nStacktrace")

        patch.setattr(loader_module, "dali", lambda: (fn, refused, types))
        with pytest.raises(
            InputError,
            match=r"DALI cannot run on cpu \(CUDA driver version is insufficient\): take --loader torch",
        ):
            train_loader(noise, plan, backend="dali")
    monkeypatch.setitem(sys.modules, "nvidia.dali", ModuleType("nvidia.dali"))  # installed, and empty
    with pytest.raises(
        InputError,
        match=r"DALI is installed but cannot be imported \(cannot import name .*take --loader torch",
    ):
        train_loader(noise, plan, backend="auto")


# --- borders


def test_an_unknown_backend_is_refused_with_the_choices(noise):
    with pytest.raises(InputError, match="unknown loader 'turbo': choose from auto, dali, torch"):
        train_loader(noise, BatchPlan(30, 8, seed=0), backend="turbo")


def test_a_plan_for_another_number_of_images_is_refused(noise):
    with pytest.raises(ValueError, match="the plan is for 29 images, the arrays hold 30"):
        train_loader(noise, BatchPlan(29, 8, seed=0))


@pytest.mark.parametrize(
    "images",
    [np.zeros((30, 28, 28, 3), np.uint8), np.zeros((30, 32, 32, 3), np.float32)],
    ids=["28x28", "floats"],
)
def test_images_of_another_size_or_type_are_refused(noise, images, backend):
    with pytest.raises(ValueError, match=r"train_loader wants images uint8 \[n, 32, 32, 3\], but they are"):
        train_loader(dataclasses.replace(noise, images=images), BatchPlan(30, 8, seed=0), backend=backend)
