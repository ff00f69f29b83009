"""What a batch is, and how pixels become normalised images. The evaluation needs no more than that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from fastvid.datasets.arrays import SIZE, Arrays


class Batch(NamedTuple):
    """images: [B, 3, 32, 32] channels-last, normalised.  labels: int64 [B]."""

    images: torch.Tensor
    labels: torch.Tensor


class EvalLoader:
    """`for images, labels in loader`: every image once, in order, unaugmented, normalised as in training.

    arrays: images uint8 [n, 32, 32, 3].  dtype: of the images, fp32 unless given.
    Raises ValueError for a dtype that is not floating-point.
    """

    def __init__(
        self,
        arrays: Arrays,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ):
        device = torch.device(device)
        self._normalise = Normaliser(arrays, device, image_dtype(dtype))
        self._pixels = to_words(arrays.images).view(-1, SIZE, SIZE).to(device)
        self._labels = torch.from_numpy(arrays.labels).to(device)
        self.batch_size, self.num_images = batch_size, len(arrays)

    def __iter__(self) -> Iterator[Batch]:
        for pixels, labels in zip(self._pixels.split(self.batch_size), self._labels.split(self.batch_size)):
            yield Batch(self._normalise(pixels), labels)


class Normaliser:
    """int32 pixels [B, 32, 32] of to_words -> [B, 3, 32, 32] channels-last, a view."""

    def __init__(self, arrays: Arrays, device: torch.device, dtype: torch.dtype):
        mean, std = constants(arrays)
        self._mean, self._scale = (torch.from_numpy(values).to(device) for values in (mean, 1 / std))
        self._dtype = dtype

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        rgb = pixels.view(torch.uint8).view(*pixels.shape, 4)[..., :3]
        images = (rgb.float() - self._mean).mul_(self._scale).to(self._dtype)
        return images.permute(0, 3, 1, 2)


def image_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """fp32 for None. Raises ValueError for integers, which would round normalised images to 0 and 1."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(
            f"the dtype of images is {dtype}, wanted a floating-point type such as torch.bfloat16"
        )
    return dtype or torch.float32


def constants(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """255·mean and 255·std per channel, fp32 [3]."""
    return (255 * np.array(arrays.mean)).astype(np.float32), (255 * np.array(arrays.std)).astype(np.float32)


def to_words(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> int32 [n·H·W]: one word per pixel: a gather moves one element per pixel."""
    words = np.zeros((*images.shape[:3], 4), dtype=np.uint8)
    words[..., :3] = images
    return torch.from_numpy(words.view(np.int32).reshape(-1))


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy to a device without making the host wait for a GPU."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
