"""The 1,797 handwritten digits of scikit-learn, enlarged from 8x8 to 32x32 pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastvid.datasets.arrays import Arrays, channel_statistics
from fastvid.errors import InputError

TRAIN_PER_CLASS = 140  # of 174 to 183; the test split holds the other images


def load(root: Path, split: str) -> Arrays:
    """The first 140 images of each class are the training split. `root` is ignored.

    Each pixel becomes 4x4 equal pixels with three equal channels. The 17 grey levels are spread over 0..255.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("--dataset digits needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    images, labels = np.repeat(grey[..., None], 3, axis=3), digits.target.astype(np.int64)
    whole = Arrays(images, labels, tuple("0123456789"), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    in_train = whole.rank_in_class() < TRAIN_PER_CLASS
    mean, std = channel_statistics(images[in_train])
    return replace(whole.select(in_train if split == "train" else ~in_train), mean=mean, std=std)


def located(root: Path) -> bool:
    return True


def files(root: Path, split: str) -> list[Path]:
    return []
