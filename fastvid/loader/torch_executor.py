"""The batch plan in plain PyTorch, on any device: one gather of pixels, then the arithmetic."""

from __future__ import annotations

import numpy as np
import torch

from fastvid.datasets.arrays import SIZE, Arrays, reflect_pad
from fastvid.loader.batch import Batch, Normaliser, to_device, to_words
from fastvid.plan import MARGIN, BatchPlan


class TorchExecutor:
    def __init__(self, arrays: Arrays, plan: BatchPlan, device: torch.device, dtype: torch.dtype):
        self._plan, self._device = plan, device
        padded = reflect_pad(arrays.images, MARGIN)
        self._padded_size = padded.shape[1]
        self._pixels = to_words(padded).to(device)
        self._labels = torch.from_numpy(arrays.labels).to(device)
        self._normalise = Normaliser(arrays, device, dtype)
        self._column = torch.arange(SIZE, device=device)

    def batch(self, epoch: int, step: int) -> Batch:
        plan = np.stack(self._plan.batch(epoch, step))  # one transfer; bool becomes 0 and 1
        indices, top, left, flip = to_device(plan, self._device)
        size, forward, backward = self._padded_size, self._column, SIZE - 1 - self._column
        columns = left[:, None] + torch.where(flip[:, None] == 1, backward, forward)  # [B, 32]
        first_of_row = (indices[:, None] * size + top[:, None] + self._column) * size  # [B, 32]
        pixels = self._pixels.take(first_of_row[:, :, None] + columns[:, None, :])
        return Batch(self._normalise(pixels), self._labels[indices])
