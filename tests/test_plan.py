import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
from scipy.stats import chisquare

from fastvid.plan import BatchPlan

SIZES = [
    pytest.param(256, 128, id="full-batches"),
    pytest.param(1000, 128, id="short-last-batch"),
    pytest.param(5, 128, id="batch-larger-than-data"),
    pytest.param(1, 1, id="one-image"),
]


def whole_epoch(plan, epoch):
    """The values of all batches of an epoch, one after another."""
    batches = [plan.batch(epoch, step) for step in range(plan.steps_per_epoch)]
    return [np.concatenate(values) for values in zip(*batches)]


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_depends_on_seed_epoch_and_step_alone_not_on_what_was_asked_or_overwritten_before():
    forward, backward = (BatchPlan(1000, 128, seed=3) for _ in range(2))
    cells = [(epoch, step) for epoch in range(5) for step in range(8)]
    first = {cell: forward.batch(*cell) for cell in cells}
    backward.batch(4, 7).indices[:] = 99
    assert all(equal(backward.batch(*cell), first[cell]) for cell in reversed(cells))


def test_a_batch_is_the_same_in_another_process():
    expression = "[values.tolist() for values in BatchPlan(1000, 16, seed=3).batch(7, 5)]"
    program = f"from fastvid.plan import BatchPlan; print({expression})"
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == str(eval(expression))


@pytest.mark.parametrize("images, batch_size", SIZES)
def test_every_image_comes_once_per_epoch_and_only_the_last_batch_is_short(images, batch_size):
    plan = BatchPlan(images, batch_size, seed=0)
    lengths = [len(plan.batch(2, step).indices) for step in range(plan.steps_per_epoch)]
    assert lengths[:-1] == [batch_size] * (len(lengths) - 1) and 0 < lengths[-1] <= batch_size
    indices, top, left, flip = whole_epoch(plan, 2)
    assert sorted(indices) == list(range(images))
    assert len(top) == len(left) == len(flip) == images
    assert (indices.dtype, top.dtype, left.dtype, flip.dtype) == (np.int64, np.int64, np.int64, bool)
    # A random permutation has one fixed point on average (Poisson): more than 10 have probability 1e-8.
    assert (indices == np.arange(images)).sum() <= 10


def test_all_81_crops_with_and_without_flip_are_equally_frequent():
    # Expected chi-square: 161. One draw for all 128 images of a batch makes it 128 times as large. Edges at
    # half weight (a uniform real number rounded to 0..8) add 5,600. The seed is fixed.
    _, top, left, flip = whole_epoch(BatchPlan(50_000, 128, seed=0), 0)
    assert top.min() == left.min() == 0 and top.max() == left.max() == 8
    counts = np.bincount((top * 9 + left) * 2 + flip, minlength=162)
    assert counts.min() > 0
    assert chisquare(counts).pvalue > 0.01


def test_an_image_is_augmented_differently_in_each_epoch():
    plan = BatchPlan(9_000, 128, seed=0)
    by_image = []
    for epoch in (0, 1):
        indices, *augmentation = whole_epoch(plan, epoch)
        by_image.append(np.stack(augmentation)[:, np.argsort(indices)])
    same = (by_image[0] == by_image[1]).mean(axis=1)
    # Independent draws agree in 1 of 9 offsets and 1 of 2 flips. Four standard deviations of 9,000 draws are
    # 0.013 and 0.021.
    assert np.allclose(same, [1 / 9, 1 / 9, 1 / 2], atol=[0.013, 0.013, 0.021])


def test_no_two_epochs_and_no_two_seeds_share_a_permutation():
    plans = [BatchPlan(100, 100, seed=seed) for seed in (0, 1, 2, 3, 2**64 - 1)]
    orders = {plan.batch(epoch, 0).indices.tobytes() for plan in plans for epoch in range(20)}
    assert len(orders) == 100  # with seed + epoch as the key there would be 23


@pytest.mark.parametrize("images, batch_size", SIZES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_out_the_batch_of_one_rank_without_overlap(images, batch_size, world_size):
    whole = BatchPlan(images, batch_size, seed=5)
    ranks = [
        BatchPlan(images, batch_size, seed=5, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for step in range(whole.steps_per_epoch):
        parts = [list(zip(*rank.batch(1, step))) for rank in ranks]
        assert sorted(chain(*parts)) == sorted(zip(*whole.batch(1, step)))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    "arguments, phrase",
    [
        ({"num_images": 0}, "at least one image"),
        ({"batch_size": 0}, "batch of at least one"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"rank": -1, "world_size": 2}, "rank -1 of 2"),
        ({"world_size": 0}, "rank 0 of 0"),
        ({"seed": -1}, "seed in 0"),
        ({"seed": 2**64}, "seed in 0"),
    ],
)
def test_impossible_plans_are_refused(arguments, phrase):
    with pytest.raises(ValueError, match=phrase):
        BatchPlan(**({"num_images": 10, "batch_size": 4, "seed": 0} | arguments))


@pytest.mark.parametrize("epoch, step", [(0, 3), (0, -1), (-1, 0)])
def test_a_step_outside_the_epoch_is_refused(epoch, step):
    with pytest.raises(IndexError, match=f"no step {step} of epoch {epoch}: an epoch has 3 steps"):
        BatchPlan(10, 4, seed=0).batch(epoch, step)
