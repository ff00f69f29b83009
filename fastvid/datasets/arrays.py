"""A split in memory: uint8 images, labels, and the constants that normalise them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastvid.errors import InputError

SIZE = 32  # height and width of every image, in pixels


@dataclass(frozen=True)
class Arrays:
    """The images of one split.

    images: uint8 [n, 32, 32, 3], RGB.  labels: int64 [n], 0 .. len(class_names) - 1.
    mean, std: per channel, of the training split, in units of the full range (0 to 1).
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.labels)

    def sha256(self) -> str:
        """SHA-256 of images, labels and class names, in hex. Equal data sets have equal values."""
        digest = hashlib.sha256("\n".join(self.class_names).encode())
        for values in (self.images, self.labels):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def class_sizes(self) -> np.ndarray:
        """Number of images of each class, int64 [classes]."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def rank_in_class(self) -> np.ndarray:
        """For each image, how many images of its class come before it, int64 [n]."""
        rank = np.empty(len(self), dtype=np.int64)
        for label, size in enumerate(self.class_sizes()):
            rank[self.labels == label] = np.arange(size)
        return rank

    def select(self, chosen: np.ndarray) -> Arrays:
        """A copy of the images where `chosen`, bool [n], is true."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def subset(self, per_class: int) -> Arrays:
        """The first `per_class` images of each class, in file order.

        So subsets are balanced, a smaller subset is part of a larger one, and every method trains on the same
        images. Raises InputError below 1 and above the size of the smallest class.
        """
        name, size = self._smallest_class()
        if not 1 <= per_class <= size:
            raise InputError(
                f"{per_class} images per class were asked for, but class {name!r} has {size}: "
                f"take at most {size}, at least 1"
            )
        return self.select(self.rank_in_class() < per_class)

    def holdout(self, per_class: int) -> tuple[Arrays, Arrays]:
        """Split off the last `per_class` images of each class, in file order: (other images, those images).

        Raises InputError below 1, and when a class would have no image left to train on.
        """
        name, size = self._smallest_class()
        if not 1 <= per_class < size:
            raise InputError(
                f"a validation split of {per_class} images per class was asked for, but class {name!r} has "
                f"{size}: hold out at most {size - 1}, at least 1"
            )
        last = self.rank_in_class() >= self.class_sizes()[self.labels] - per_class
        return self.select(~last), self.select(last)

    def _smallest_class(self) -> tuple[str, int]:
        sizes = self.class_sizes()
        return self.class_names[int(sizes.argmin())], int(sizes.min())


@dataclass(frozen=True)
class Data:
    """The images that a group of students is trained and evaluated on.

    percent: share of the training split that `train` holds.
    sha256: of the whole training split, and of the test split if the evaluation uses it.
    """

    train: Arrays
    evaluation: Arrays
    evaluated_on: str
    percent: float
    sha256: str


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(mean, standard deviation) per channel of uint8 [n, H, W, 3], in units of the full range.

    Both are rounded to 4 digits, and a standard deviation is at least 0.0001.
    """
    counts = np.zeros((3, 256), dtype=np.int64)
    for first in range(0, len(images), 1000):  # bincount makes an int64 copy: 8 bytes per pixel and channel
        part = images[first : first + 1000].reshape(-1, 3)
        counts += [np.bincount(part[:, channel], minlength=256) for channel in range(3)]
    levels = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    std = np.sqrt(np.maximum(share @ levels**2 - mean**2, 1e-8))
    return tuple(round(float(m), 4) for m in mean), tuple(max(round(float(s), 4), 1e-4) for s in std)


def reflect_pad(images: np.ndarray, margin: int) -> np.ndarray:
    """uint8 [n, H, W, 3] -> [n, H + 2·margin, W + 2·margin, 3]: a border of mirrored pixels."""
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="reflect")


def files_digest(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 of the paths below `root`, the sizes and the times of files, in hex. A file may be missing.

    The time of the last status change (ctime) reveals a file that was replaced by one of equal size and date.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            state = path.stat()
            facts = f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        except OSError:
            facts = "missing"
        digest.update(f"{path.relative_to(root)} {facts}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
