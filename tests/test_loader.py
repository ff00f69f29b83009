import numpy as np
import pytest
import torch

from fastvid.datasets import Arrays
from fastvid.errors import InputError
from fastvid.loader import EvalLoader, train_loader
from fastvid.plan import BatchPlan

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@pytest.fixture
def noise():
    """30 images of noise."""
    random = np.random.default_rng(0)
    return Arrays(random.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8), random.integers(0, 10, 30), tuple("0123456789"), MEAN, STD)


@pytest.fixture
def coordinates():
    """30 images whose pixels hold (row, column, number of the image), not normalised; the label is the number too."""
    images = np.empty((30, 32, 32, 3), np.uint8)
    images[..., 0], images[..., 1] = np.arange(32)[:, None], np.arange(32)
    images[..., 2] = np.arange(30)[:, None, None]
    return Arrays(images, np.arange(30), tuple(map(str, range(30))), (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))


def assert_normalised(images, pixels):
    """`images` is (pixels/255 - mean)/std but for rounding.

    In fp32 the loader rounds 255·mean, their difference to the pixel, 1/(255·std) and the product: with u = 2^-24 the error is
    at most u·mean/std + 3u·|result|, to first order. 4u instead of 3u covers the second.
    """
    mean, std = np.array(MEAN), np.array(STD)
    expected = (pixels / 255 - mean) / std
    error = np.abs(images.double().permute(0, 2, 3, 1).cpu().numpy() - expected)
    assert (error <= 2.0**-24 * (mean / std + 4 * np.abs(expected))).all()


def test_a_batch_is_what_a_slow_pad_crop_flip_normalise_gives(noise, device):
    plan = BatchPlan(30, 12, seed=1)
    for step, (images, labels) in enumerate(train_loader(noise, plan, device=device).epoch(2)):
        chosen = plan.batch(2, step)
        pixels = []
        for index, top, left, flip in zip(*chosen):
            padded = np.pad(noise.images[index], ((4, 4), (4, 4), (0, 0)), mode="reflect")
            crop = padded[top:top + 32, left:left + 32]
            pixels.append(crop[:, ::-1] if flip else crop)
        assert_normalised(images, np.stack(pixels))
        assert labels.tolist() == noise.labels[chosen.indices].tolist() and labels.dtype == torch.int64
        assert images.device.type == labels.device.type == device


def test_crops_start_exactly_at_the_planned_pixel_and_flips_mirror_columns_only(coordinates):
    def source(position):
        """Row or column that reflection without repeating the edge shows at a position outside 0..31."""
        position = np.abs(position)
        return np.where(position > 31, 62 - position, position)

    plan = BatchPlan(30, 30, seed=0)
    seen = set()
    for epoch in range(30):  # 900 draws of 162 combinations, so that each edge and each flip is among them
        (images, labels), = train_loader(coordinates, plan).epoch(epoch)
        rows, columns, number = images.round().int().unbind(1)
        indices, top, left, flip = plan.batch(epoch, 0)
        walk = np.where(flip[:, None], np.arange(31, -1, -1), np.arange(32))
        assert (rows.numpy() == source(top[:, None] + np.arange(32) - 4)[:, :, None]).all()
        assert (columns.numpy() == source(left[:, None] + walk - 4)[:, None, :]).all()
        assert (number.numpy() == indices[:, None, None]).all() and labels.tolist() == indices.tolist()
        seen |= set(zip(top, left, flip))
    corners = {(top, left, flip) for top in (0, 8) for left in (0, 8) for flip in (False, True)}
    assert corners <= seen


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_images_are_channels_last_views_of_the_wanted_type_rounded_once(dtype, noise):
    plan = BatchPlan(30, 8, seed=0)
    for loaders in (lambda d: train_loader(noise, plan, dtype=d).epoch(0), lambda d: EvalLoader(noise, 8, dtype=d)):
        for (images, _), (exact, _) in zip(loaders(dtype), loaders(torch.float32), strict=True):
            assert images.dtype == (dtype or torch.float32)
            assert images.stride() == (3072, 1, 96, 3) and images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(images, exact.to(images.dtype))


def test_the_short_last_batch_is_kept(noise):
    sizes = [len(labels) for _, labels in train_loader(noise, BatchPlan(30, 8, seed=0)).epoch(0)]
    assert sizes == [8, 8, 8, 6]


def test_starting_in_the_middle_of_an_epoch_gives_the_batches_that_were_left(noise):
    loader = train_loader(noise, BatchPlan(30, 8, seed=0))
    whole, rest = list(loader.epoch(3)), list(loader.epoch(3, start_step=2))
    assert len(rest) == 2
    assert all(torch.equal(a, b) for one, other in zip(whole[2:], rest) for a, b in zip(one, other))


def test_each_rank_loads_its_part_of_the_batch(coordinates):
    whole, *ranks = (train_loader(coordinates, BatchPlan(30, 8, seed=0, **share)).epoch(0)
                     for share in ({}, {"rank": 0, "world_size": 2}, {"rank": 1, "world_size": 2}))
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


def test_an_unknown_backend_is_refused_with_the_choices(noise):
    with pytest.raises(InputError, match="unknown loader 'turbo': choose from auto, .*torch"):
        train_loader(noise, BatchPlan(30, 8, seed=0), backend="turbo")


def test_a_plan_for_another_number_of_images_is_refused(noise):
    with pytest.raises(ValueError, match="the plan is for 29 images, the arrays hold 30"):
        train_loader(noise, BatchPlan(29, 8, seed=0))
