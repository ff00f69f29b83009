"""CIFAR-10 and CIFAR-100 from their official files.

The files are pickles, and unpickling runs code. So a file is read into memory once, and only bytes with the
published md5 are unpickled.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastvid.datasets.arrays import SIZE, Arrays
from fastvid.errors import InputError


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets.

    train, test, meta: names of files and their md5, as torchvision publishes them.
    label_key, names_key: the dictionary keys of the labels and of the class names in these files.
    """

    folder: str
    train: dict[str, str]
    test: dict[str, str]
    meta: tuple[str, str]
    label_key: str
    names_key: str
    torchvision_class: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def files(self, root: Path, split: str) -> list[Path]:
        return [root / self.folder / file for file in (*getattr(self, split), self.meta[0])]

    def located(self, root: Path) -> bool:
        return all(path.is_file() for split in ("train", "test") for path in self.files(root, split))

    def load(self, root: Path, split: str) -> Arrays:
        folder = root / self.folder
        if not folder.is_dir():
            raise InputError(
                f"no {self.folder} in {root}: point --data at the folder that holds it, or add --download"
            )
        images, labels = [], []
        for file, md5 in getattr(self, split).items():
            content = _unpickle(folder / file, md5)
            images.append(content["data"].reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1))
            labels.append(np.asarray(content[self.label_key], dtype=np.int64))
        names = tuple(_unpickle(folder / self.meta[0], self.meta[1])[self.names_key])
        return Arrays(
            np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels), names, self.mean, self.std
        )

    def download(self, root: Path) -> None:
        """Fetch missing files through torchvision, which checks their md5. Raises InputError."""
        try:
            import torchvision
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
            raise InputError(
                "--download needs torchvision: pip install torchvision (the release that fits this torch)"
            ) from error
        try:
            getattr(torchvision.datasets, self.torchvision_class)(str(root), download=True)
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"could not download {self.folder} to {root}: {reason}; "
                "fetch the archive by hand and unpack it there"
            ) from error


CIFAR10 = Cifar(
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta=("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
    label_key="labels",
    names_key="label_names",
    torchvision_class="CIFAR10",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Cifar(
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta=("meta", "7973b15100ade9c7d40fb424638fde48"),
    label_key="fine_labels",
    names_key="fine_label_names",
    torchvision_class="CIFAR100",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def _unpickle(path: Path, md5: str) -> dict:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}: unpack the official archive again, or add --download"
        ) from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise InputError(
            f"{path}: md5 is {found}, the official file has {md5}: it is damaged or another file; "
            "unpack the official archive again"
        )
    return pickle.load(io.BytesIO(content), encoding="latin1")
