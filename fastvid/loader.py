"""A batch plan, executed: uint8 images in memory -> augmented, normalised, channels-last batches on a device.

The pool is reflect-padded once and lives on the device; a batch is one gather of its cropped and flipped pixels, then
(pixel - 255·mean) / (255·std) in fp32.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from fastvid.datasets import SIZE, Arrays, reflect_pad
from fastvid.errors import InputError
from fastvid.plan import MARGIN, BatchPlan, Plan

BACKENDS = ("torch",)


class Batch(NamedTuple):
    """images: [B, 3, 32, 32] channels-last, normalised.  labels: int64 [B]."""

    images: torch.Tensor
    labels: torch.Tensor


def choose_backend(backend: str) -> str:
    """What executes the plan for this --loader. Raises InputError for one that is not there."""
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"unknown loader {backend!r}: choose from auto, {', '.join(BACKENDS)}")
    return BACKENDS[0] if backend == "auto" else backend


def train_loader(arrays: Arrays, plan: BatchPlan, *, backend: str = "auto", device: str | torch.device = "cpu",
                 dtype: torch.dtype | None = None) -> TrainLoader:
    """Batches of `arrays` as `plan` orders, crops and flips them.

    backend: auto or torch.  device: where the pool and the batches live.  dtype: of the images, fp32 unless given.
    Raises InputError for an unknown backend, ValueError when plan and arrays differ in length.
    """
    choose_backend(backend)
    if plan.num_images != len(arrays):
        raise ValueError(f"the plan is for {plan.num_images} images, the arrays hold {len(arrays)}")
    return TrainLoader(arrays, plan, torch.device(device), dtype or torch.float32)


class TrainLoader:
    """`for images, labels in loader.epoch(e)`; see train_loader."""

    def __init__(self, arrays: Arrays, plan: BatchPlan, device: torch.device, dtype: torch.dtype):
        self.plan, self.device = plan, device
        padded = reflect_pad(arrays.images, MARGIN)
        self._padded_size = padded.shape[1]
        self._pixels = _rgbx(padded).to(device)
        self._labels = torch.from_numpy(arrays.labels).to(device)
        self._normalise = _Normaliser(arrays, device, dtype)
        self._column = torch.arange(SIZE, device=device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from `start_step` on."""
        for step in range(start_step, self.plan.steps_per_epoch):
            yield self._execute(self.plan.batch(epoch, step))

    def _execute(self, plan: Plan) -> Batch:
        indices, top, left, flip = torch.from_numpy(np.stack(plan)).to(self.device)  # one transfer; bool becomes 0 and 1
        size = self._padded_size
        columns = left[:, None] + torch.where(flip[:, None] == 1, SIZE - 1 - self._column, self._column)  # [B, 32]
        rows = (indices[:, None] * size + top[:, None] + self._column) * size  # [B, 32], first pixel of each row
        pixels = self._pixels.take(rows[:, :, None] + columns[:, None, :])
        return Batch(self._normalise(pixels), self._labels[indices])


class EvalLoader:
    """Every image once, in order, unaugmented, with the normalisation of training: `for images, labels in loader`."""

    def __init__(self, arrays: Arrays, batch_size: int, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None):
        device = torch.device(device)
        self._pixels = _rgbx(arrays.images).view(-1, SIZE, SIZE).to(device)
        self._labels = torch.from_numpy(arrays.labels).to(device)
        self._normalise = _Normaliser(arrays, device, dtype or torch.float32)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        for pixels, labels in zip(self._pixels.split(self.batch_size), self._labels.split(self.batch_size)):
            yield Batch(self._normalise(pixels), labels)


class _Normaliser:
    """int32 pixels [B, 32, 32] -> [B, 3, 32, 32] channels-last, without a copy after the arithmetic."""

    def __init__(self, arrays: Arrays, device: torch.device, dtype: torch.dtype):
        mean = np.array(arrays.mean, dtype=np.float64) * 255
        scale = 1 / (np.array(arrays.std, dtype=np.float64) * 255)
        self._mean, self._scale = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, scale))
        self._dtype = dtype

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        rgb = pixels.view(torch.uint8).view(*pixels.shape, 4)[..., :3]
        images = (rgb.float() - self._mean).mul_(self._scale).to(self._dtype)
        return images.permute(0, 3, 1, 2)


def _rgbx(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> int32 [n·H·W]: a pixel in one word, so that a gather moves one element per pixel."""
    words = np.zeros((*images.shape[:3], 4), dtype=np.uint8)
    words[..., :3] = images
    return torch.from_numpy(words.view(np.int32).reshape(-1))
