"""Labelled images in memory: CIFAR-10 and CIFAR-100, folders of images, scikit-learn's digits.

A data set is one file in this folder and one line of DATASETS. Importing this package imports neither torch
nor NumPy, so the configuration, the command line and the report read DATASETS at no cost.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvid.errors import InputError

if TYPE_CHECKING:
    from fastvid.datasets.arrays import Arrays, Data

__all__ = [
    "DATASETS",
    "NAMES",
    "Arrays",
    "Data",
    "Dataset",
    "find",
    "fingerprint",
    "load",
    "load_once",
    "located",
]


@dataclass(frozen=True)
class Dataset:
    """Where a data set is implemented, and the defaults of its experiments.

    where: a module, or `module:object`, with the three functions below. It is imported on first use.

        load(root, split) -> Arrays        split: train or test
        located(root) -> bool              whether the files seem to be there
        files(root, split) -> list[Path]   the files that `load` reads; `fingerprint` watches them

      A source that can fetch missing files also has download(root).
    classes: number of classes, all of one size; None when it depends on the user's files.
    protocol: a name in fastvid.config.PROTOCOLS.
    fractions: columns of the table: full, or percent of each class.
    slow: the first load may take minutes.
    """

    where: str
    classes: int | None = None
    protocol: str = "seed"
    fractions: tuple[str, ...] = ("full", "20", "10", "2")
    slow: bool = False

    @property
    def source(self) -> Any:
        """The module or object that reads the files."""
        return pkgutil.resolve_name(self.where)


DATASETS = {
    "cifar10": Dataset("fastvid.datasets.cifar:CIFAR10", classes=10),
    "cifar100": Dataset("fastvid.datasets.cifar:CIFAR100", classes=100),
    "folder": Dataset("fastvid.datasets.folder", slow=True),
    "digits": Dataset("fastvid.datasets.digits", classes=10, protocol="quick", fractions=("full", "5")),
}
NAMES = tuple(DATASETS)


def find(name: str) -> Dataset:
    """The data set of this name. Raises InputError for an unknown name."""
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    return DATASETS[name]


def load(name: str, root: str | Path, split: str, *, download: bool = False) -> Arrays:
    """Load the `train` or `test` split of a data set from its files under `root`.

    name: cifar10 or cifar100 (the Python version, as torchvision unpacks it), folder (root/SPLIT/CLASS/IMAGE)
    or digits (part of scikit-learn; `root` is ignored).
    download: fetch missing CIFAR files through torchvision.
    Returns Arrays: images uint8 [n, 32, 32, 3] RGB and labels int64 [n], in the order of the files.
    Raises InputError when files are missing, damaged or laid out differently, and when an optional package is
    missing.
    """
    _check_split(split)
    source = find(name).source
    if download and hasattr(source, "download"):
        source.download(Path(root))
    return source.load(Path(root), split)


def load_once(name: str, root: str | Path, split: str, *, download: bool = False) -> Arrays:
    """Same as `load`, but a split whose files have not changed is returned from memory.

    The two latest splits stay in memory. All callers share their arrays and must not write into them.
    """
    _check_split(split)
    return _load_once(name, str(root), split, download, fingerprint(name, root, split))


@lru_cache(maxsize=2)  # a grid trains many groups on the two splits of one data set
def _load_once(name: str, root: str, split: str, download: bool, fingerprint: str) -> Arrays:
    return load(name, root, split, download=download)


def fingerprint(name: str, root: str | Path, split: str) -> str:
    """A text that is equal as long as `load` gives the same arrays, computed without reading an image.

    It changes when `root` is another folder, also after os.chdir, and when a file is added, removed, renamed
    or written. Raises InputError for an unknown name and for a folder with another layout.
    """
    from fastvid.datasets.arrays import files_digest

    root = Path(root).resolve()
    return f"{root} {files_digest(root, find(name).source.files(root, split))}"


def located(name: str, root: str | Path) -> bool:
    """Whether the files of a data set seem to be under `root`. Their content is not read."""
    return find(name).source.located(Path(root))


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}: choose train or test")


def __getattr__(name: str):
    if name in ("Arrays", "Data"):  # their module imports NumPy
        return getattr(import_module("fastvid.datasets.arrays"), name)
    raise AttributeError(f"module 'fastvid.datasets' has no attribute {name!r}")
