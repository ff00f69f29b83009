"""Labelled images in memory: CIFAR-10/100 in their official files, image folders, scikit-learn's digits. NumPy only.

Every data set ends as Arrays: uint8 [n, 32, 32, 3] RGB and int64 [n], in the order of its files. The official CIFAR files
are pickles, and unpickling runs code: only bytes whose md5 is the published one are unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastvid import cache, decode
from fastvid.decode import SIZE
from fastvid.errors import InputError

CACHE = ".fastvid-cache"  # folder beside the data
DIGITS_TRAIN_PER_CLASS = 140  # of 174 to 183; the rest is the test split


@dataclass(frozen=True)
class Arrays:
    """A split in memory, with the constants that normalise it.

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

    def is_whole(self) -> bool:
        """Whether shapes, types, labels, names and constants are as they should be."""
        constants = (*self.mean, *self.std)
        if not all(type(value) is float and 0 <= value <= 1 for value in constants) or not all(self.std):
            return False
        return (
            all(isinstance(name, str) for name in self.class_names)
            and self.images.dtype == np.uint8
            and self.images.shape == (len(self), SIZE, SIZE, 3)
            and self.labels.dtype == np.int64
            and self.labels.ndim == 1
            and len(self.mean) == len(self.std) == 3
            and (not len(self) or 0 <= self.labels.min() <= self.labels.max() < len(self.class_names))
        )

    def sha256(self) -> str:
        """Of images, labels and class names, in hex: two data sets that share it are the same."""
        digest = hashlib.sha256("\n".join(self.class_names).encode())
        for values in (self.images, self.labels):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def class_sizes(self) -> np.ndarray:
        """Images of each class, int64 [classes]."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def subset(self, per_class: int) -> Arrays:
        """The first `per_class` images of each class, in file order: nested, balanced, the same for every method."""
        sizes = self.class_sizes()
        if per_class > sizes.min():
            name, size = self.class_names[int(sizes.argmin())], sizes.min()
            raise InputError(
                f"{per_class} images per class were asked for, but class {name!r} has {size}: take at most {size}"
            )
        return self._where(self._rank_in_class() < per_class)

    def holdout(self, per_class: int) -> tuple[Arrays, Arrays]:
        """(all but the last `per_class` images of each class, those last images): a validation split."""
        sizes = self.class_sizes()
        if per_class >= sizes.min():
            name, size = self.class_names[int(sizes.argmin())], sizes.min()
            raise InputError(
                f"a validation split of {per_class} images per class leaves nothing to train on: class {name!r} has {size}, "
                f"hold out at most {size - 1}"
            )
        last = self._rank_in_class() >= sizes[self.labels] - per_class
        return self._where(~last), self._where(last)

    def _rank_in_class(self) -> np.ndarray:
        rank = np.empty(len(self), dtype=np.int64)
        for label, size in enumerate(self.class_sizes()):
            rank[self.labels == label] = np.arange(size)
        return rank

    def _where(self, chosen: np.ndarray) -> Arrays:
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


@dataclass(frozen=True)
class Data:
    """What a group trains on and what it is evaluated on; the share of the training split in percent."""

    train: Arrays
    evaluation: Arrays
    evaluated_on: str
    percent: float
    sha256: str
    """of the whole training split and of the test split, where that is evaluated on"""


@dataclass(frozen=True)
class _Cifar:
    folder: str
    train: dict[str, str]  # file: md5, as torchvision publishes them
    test: dict[str, str]
    meta: tuple[str, str]
    label_key: str
    names_key: str
    torchvision_class: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CIFAR = {
    "cifar10": _Cifar(
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
    ),
    "cifar100": _Cifar(
        folder="cifar-100-python",
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        meta=("meta", "7973b15100ade9c7d40fb424638fde48"),
        label_key="fine_labels",
        names_key="fine_label_names",
        torchvision_class="CIFAR100",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}

NAMES = (*_CIFAR, "folder", "digits")


def load(name: str, root: str | Path, split: str, *, download: bool = False) -> Arrays:
    """Load the `train` or `test` split of a data set found under `root`.

    name: cifar10 or cifar100 (the python files as torchvision unpacks them), folder (root/SPLIT/CLASS/*.png or .jpg), or
    digits (embedded in scikit-learn; `root` is ignored).  download: fetch missing CIFAR files through torchvision.
    Raises InputError when the files are missing, damaged or laid out differently, or an optional package is missing.
    """
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}: choose train or test")
    if name in _CIFAR:
        return _load_cifar(_CIFAR[name], Path(root), split, download)
    if name == "folder":
        return _load_folder(Path(root), split)
    if name == "digits":
        return _load_digits(split)
    raise InputError(f"unknown data set {name!r}: choose from {', '.join(NAMES)}")


def located(name: str, root: str | Path) -> bool:
    """Whether the files of `name` seem to be under `root` (their content is not read)."""
    if name in _CIFAR:
        spec = _CIFAR[name]
        return all(
            (Path(root) / spec.folder / file).is_file() for file in (*spec.train, *spec.test, spec.meta[0])
        )
    return name == "digits" or (Path(root) / "train").is_dir() and (Path(root) / "test").is_dir()


def reflect_pad(images: np.ndarray, margin: int) -> np.ndarray:
    """uint8 [n, H, W, 3] -> [n, H + 2·margin, W + 2·margin, 3], the border mirrored without repeating the edge."""
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="reflect")


def _cached(name: str, root: Path, split: str, key: str, make: Callable[[], Arrays]) -> Arrays:
    """The split as it was made before, if `key` has not changed since; else made and kept."""
    path = root / CACHE / f"{name}-{split}.safetensors"
    kept = _kept(path, key)
    if kept is None:
        with cache.making(path) as another_made_it:
            kept = _kept(path, key) if another_made_it else None
            if kept is None:
                kept = make()
                cache.write(
                    path,
                    key,
                    {"images": kept.images, "labels": kept.labels},
                    {"class_names": kept.class_names, "mean": kept.mean, "std": kept.std},
                )
    return kept


def _kept(path: Path, key: str) -> Arrays | None:
    arrays, facts = cache.read(path, key) or ({}, {})
    with contextlib.suppress(KeyError, TypeError):
        kept = Arrays(
            arrays["images"],
            arrays["labels"],
            *(tuple(facts[field]) for field in ("class_names", "mean", "std")),
        )
        if kept.is_whole():
            return kept
    return None


def _load_cifar(spec: _Cifar, root: Path, split: str, download: bool) -> Arrays:
    if download:
        _download(spec, root)
    folder = root / spec.folder
    if not folder.is_dir():
        raise InputError(
            f"no {spec.folder} in {root}: point --data at the folder that holds it, or add --download"
        )
    images, labels = [], []
    for file, md5 in getattr(spec, split).items():
        content = _unpickle(folder / file, md5)
        images.append(content["data"].reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1))
        labels.append(np.asarray(content[spec.label_key], dtype=np.int64))
    names = tuple(_unpickle(folder / spec.meta[0], spec.meta[1])[spec.names_key])
    return Arrays(
        np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels), names, spec.mean, spec.std
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


def _download(spec: _Cifar, root: Path) -> None:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise InputError(
            "--download needs torchvision: pip install torchvision (the release that fits this torch)"
        ) from error
    try:
        getattr(torchvision.datasets, spec.torchvision_class)(str(root), download=True)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
        reason = str(error).splitlines()[0]
        raise InputError(
            f"could not download {spec.folder} to {root}: {reason}; fetch the archive by hand and unpack it there"
        ) from error


def _load_folder(root: Path, split: str) -> Arrays:
    train_files, class_names = _list_images(root / "train")
    files = train_files
    if split == "test":
        files, test_names = _list_images(root / "test")
        if test_names != class_names:
            odd = ", ".join(sorted(set(test_names) ^ set(class_names)))
            raise InputError(
                f"{root}: train and test hold different classes ({odd}): give both the same folders"
            )
    train = _cached(
        "folder", root, "train", _folder_key(train_files), lambda: _read_folder(train_files, class_names)
    )
    if split == "train":
        return train
    test = _cached("folder", root, "test", _folder_key(files), lambda: _read_folder(files, class_names))
    return replace(test, mean=train.mean, std=train.std)


def _folder_key(files: list[tuple[Path, int]]) -> str:
    """Changes when a file is added, removed, renamed or written, also with its old date."""
    states = ((path.relative_to(path.parents[2]), label, path.stat()) for path, label in files)
    text = "\n".join(
        f"{name} {label} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        for name, label, state in states
    )
    return f"pillow {hashlib.sha256(text.encode()).hexdigest()}"


def _read_folder(files: list[tuple[Path, int]], class_names: tuple[str, ...]) -> Arrays:
    images = decode.images([path for path, _ in files])
    mean, std = channel_statistics(images)
    return Arrays(images, np.array([label for _, label in files], dtype=np.int64), class_names, mean, std)


def _list_images(folder: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """The image files of folder/CLASS/ with their labels, classes and files in alphabetical order."""
    if not folder.is_dir():
        raise InputError(
            f"no folder {folder}: --dataset folder wants DATA/train/CLASS/*.png|jpg and DATA/test/CLASS/*.png|jpg"
        )
    class_names = tuple(
        sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    )
    if len(class_names) < 2:
        raise InputError(
            f"{folder} holds {len(class_names)} class folders, wanted two or more: {folder.name}/CLASS/*.png|jpg"
        )
    files = []
    for label, name in enumerate(class_names):
        found = sorted(
            path
            for path in (folder / name).iterdir()
            if path.suffix.lower() in (".png", ".jpg", ".jpeg") and path.is_file()
        )
        if not found:
            raise InputError(
                f"{folder / name} holds no .png or .jpg file: put the images of this class there or remove the folder"
            )
        files += [(path, label) for path in found]
    return files, class_names


def _load_digits(split: str) -> Arrays:
    """The 1,797 8x8 digits of scikit-learn: the first 140 of each class are for training, the rest for testing.

    Each pixel becomes 4x4 equal ones, its 17 grey levels are spread over 0..255, and the three channels are equal.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("--dataset digits needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    whole = Arrays(
        np.repeat(grey[..., None], 3, axis=3),
        digits.target.astype(np.int64),
        tuple("0123456789"),
        (0, 0, 0),
        (1, 1, 1),
    )
    chosen = whole._rank_in_class() < DIGITS_TRAIN_PER_CLASS
    train = whole._where(chosen)
    mean, std = channel_statistics(train.images)
    return replace(train if split == "train" else whole._where(~chosen), mean=mean, std=std)


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(mean, standard deviation) per channel of uint8 [n, H, W, 3] in units of the full range, rounded to 4 digits."""
    counts = np.stack(
        [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)]
    )  # exact, and no float copy
    levels = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    std = np.sqrt(np.maximum(share @ levels**2 - mean**2, 1e-8))
    return tuple(round(float(m), 4) for m in mean), tuple(max(round(float(s), 4), 1e-4) for s in std)
