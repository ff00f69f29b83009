"""Which image, crop and flip enters which batch: a pure function of (seed, epoch, step).

Every epoch has its own counter-based generator, Philox with the key (seed, epoch). So any batch can be
computed directly, in any order and in any process: resuming, sharding and several loaders need no saved
random state. NumPy only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

MARGIN = 4  # pixels of reflection on each side, so that crops start at 0 .. 2·MARGIN


class Plan(NamedTuple):
    """One batch of B images.

    indices: int64 [B].  flip: bool [B].
    top, left: int64 [B], 0..8, where the crop starts in the padded image.
    """

    indices: np.ndarray
    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray


class BatchPlan:
    """The batches of every epoch of a run.

    num_images, batch_size: B is the global batch. The last batch of an epoch holds the remaining images.
    rank, world_size: each rank gets every world_size-th image of each global batch.
    Raises ValueError on sizes below one, a rank outside the world, or a seed outside 0 .. 2**64 - 1.
    """

    def __init__(self, num_images: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1):
        if num_images < 1 or batch_size < 1:
            raise ValueError(
                "BatchPlan wants at least one image and a batch of at least one, "
                f"got {num_images} and {batch_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"BatchPlan wants 0 <= rank < world_size, got rank {rank} of {world_size}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"BatchPlan wants a seed in 0 .. 2**64 - 1, got {seed}")
        self.num_images, self.batch_size, self.seed, self.rank, self.world_size = (
            num_images,
            batch_size,
            seed,
            rank,
            world_size,
        )
        self._epoch = lru_cache(maxsize=2)(self._draw)  # 2: prefetching looks into the next epoch

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_images // self.batch_size)

    def batch(self, epoch: int, step: int) -> Plan:
        """This rank's batch at `step` (0 .. steps_per_epoch - 1) of `epoch`. Raises IndexError outside."""
        if not 0 <= step < self.steps_per_epoch or epoch < 0:
            raise IndexError(f"no step {step} of epoch {epoch}: an epoch has {self.steps_per_epoch} steps")
        mine = self._mine(step)
        return Plan(*(values[mine].copy() for values in self._epoch(epoch)))

    def global_size(self, step: int) -> int:
        """Number of images of all ranks at `step`."""
        return min(self.batch_size, self.num_images - step * self.batch_size)

    def size(self, step: int) -> int:
        """Number of images of this rank at `step`. In a short last batch it may be 0."""
        return len(range(self.num_images)[self._mine(step)])

    def _mine(self, step: int) -> slice:
        start = step * self.batch_size
        return slice(start + self.rank, min(start + self.batch_size, self.num_images), self.world_size)

    def _draw(self, epoch: int) -> Plan:
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)))
        order = generator.permutation(self.num_images)
        top, left = generator.integers(0, 2 * MARGIN + 1, size=(2, self.num_images))
        flip = generator.integers(0, 2, size=self.num_images).astype(bool)
        return Plan(order, top, left, flip)
