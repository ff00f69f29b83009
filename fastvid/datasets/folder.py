"""A folder of images: ROOT/train/CLASS/IMAGE and ROOT/test/CLASS/IMAGE.

Classes and images are in alphabetical order. Nothing is left out silently. An entry of a class folder is an
image, or has a name that `_entries` ignores, or ends the run with an InputError that counts and names such
entries. Other files, such as a README, may lie beside the class folders, but no images.

Pillow decodes the images one after another. The largest centred square of an image is scaled to 32x32 pixels
(bicubic, antialiased), and only these squares stay in memory. They are cached on disk until a file changes.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastvid.datasets.arrays import SIZE, Arrays, channel_statistics, files_digest
from fastvid.errors import InputError
from fastvid.files import locked, write_atomic
from fastvid.progress import say

CACHE = ".fastvid-cache"  # folder below ROOT
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_KINDS = "png, jpg, webp, bmp, tif"
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # Pillow's names
_DECODER = "pillow 2"  # part of the cache's key: change it when the same files give other pixels


def load(root: Path, split: str) -> Arrays:
    """The images of one split. Both splits have the mean and standard deviation of the training images."""
    train_files, train_labels, class_names = _list_images(root / "train")
    if split == "test":
        files, labels, test_names = _list_images(root / "test")
        if test_names != class_names:
            odd = ", ".join(sorted(set(test_names) ^ set(class_names)))
            raise InputError(
                f"{root}: train and test hold different classes ({odd}): give both the same folders"
            )
    images = _images(root, "train", train_files)
    mean, std = channel_statistics(images)
    if split == "test":
        return Arrays(_images(root, "test", files), labels, class_names, mean, std)
    return Arrays(images, train_labels, class_names, mean, std)


def located(root: Path) -> bool:
    return (root / "train").is_dir() and (root / "test").is_dir()


def files(root: Path, split: str) -> list[Path]:
    return [path for name in dict.fromkeys(("train", split)) for path in _list_images(root / name)[0]]


# --- what lies in the folder


def _list_images(folder: Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """(files, labels int64, class names) of one split."""
    if not folder.is_dir():
        raise InputError(
            f"no folder {folder}: --dataset folder wants DATA/train/CLASS/IMAGE and DATA/test/CLASS/IMAGE "
            f"(images: {_KINDS})"
        )
    files, labels, class_names = [], [], []
    refused = defaultdict(list)
    for class_folder in _entries(folder):
        if not class_folder.is_dir():
            if not class_folder.exists():
                refused["dangling links"].append(class_folder)
            elif class_folder.suffix.lower() in SUFFIXES:
                refused["images outside a class folder"].append(class_folder)
            continue
        found = _entries(class_folder)
        _check_class(class_folder, found)
        for path in found:
            if problem := _problem(path):
                refused[problem].append(path)
            else:
                files.append(path)
                labels.append(len(class_names))
        class_names.append(class_folder.name)
    if refused:
        raise InputError(_refusal(folder, refused, len(files)))
    if len(class_names) < 2:
        raise InputError(
            f"{folder} holds {len(class_names)} class folders, wanted two or more: {folder.name}/CLASS/IMAGE"
        )
    return files, np.array(labels, dtype=np.int64), tuple(class_names)


def _entries(folder: Path) -> list[Path]:
    """Entries in alphabetical order, without hidden files and those that macOS and Windows add to folders."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"{folder}: {error.strerror or error}: check the folder and its permissions"
        ) from error
    added = ("__macosx", "thumbs.db", "desktop.ini")
    return [path for path in found if not path.name.startswith(".") and path.name.lower() not in added]


def _check_class(folder: Path, entries: list[Path]) -> None:
    if not entries:
        raise InputError(
            f"{folder} holds no image ({_KINDS}): put the images of this class there or remove the folder"
        )
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:  # results and weights hold the names of classes
        raise InputError(f"the folder name {ascii(str(folder))} is not UTF-8: rename it") from error


def _problem(path: Path) -> str | None:
    """Why this entry of a class folder cannot be an image, or None."""
    if path.is_dir():
        return "folders inside a class folder"
    if not path.exists():
        return "dangling links"
    return None if path.is_file() and path.suffix.lower() in SUFFIXES else "files of another type"


def _refusal(folder: Path, refused: dict[str, list[Path]], read: int) -> str:
    kinds = "; ".join(
        f"{len(paths):,} {kind} ({_shortened([str(path.relative_to(folder)) for path in paths], 3)})"
        for kind, paths in refused.items()
    )
    count = sum(map(len, refused.values()))
    return (
        f"{folder}: {count:,} of {count + read:,} entries cannot be trained on: {kinds}: "
        f"repair or remove them (images: {_KINDS})"
    )


def _shortened(names: list[str], most: int) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- from files to pixels


def _images(root: Path, split: str, files: list[Path]) -> np.ndarray:
    """uint8 [n, 32, 32, 3]: from the cache, if it was made from the same files, else decoded."""
    path = root / CACHE / f"folder-{split}.rgb"
    key = hashlib.sha256(f"{_DECODER} {files_digest(root, files)}".encode()).digest()
    images = _read_cache(path, key, len(files))
    if images is None:
        images = _decode(files)
        _write_cache(path, key, images)
    return images


def _decode(files: list[Path]) -> np.ndarray:
    """uint8 [n, 32, 32, 3]. Raises one InputError for all unreadable files; it names the first ten."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise InputError("--dataset folder needs Pillow: pip install pillow") from error
    if len(files) >= 1000:  # takes seconds to minutes, and a log file has no bar
        say(f"decoding {len(files):,} images")
    images, unreadable = np.empty((len(files), SIZE, SIZE, 3), np.uint8), []
    silent = sys.stderr is None or not sys.stderr.isatty()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transparency, which is dropped, and about damaged EXIF data
        for index, path in enumerate(tqdm(files, "decoding", unit=" images", leave=False, disable=silent)):
            try:
                images[index] = _decode_one(path)
            except (
                Exception
            ) as error:  # Pillow raises a dozen types for damaged files; the message shows the reason
                unreadable.append(f"{path} ({_reason(error)})")
    if unreadable:
        raise InputError(
            f"{len(unreadable):,} of {len(files):,} images cannot be read: {_shortened(unreadable, 10)}: "
            "replace or remove them"
        )
    return images


def _decode_one(path: Path) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(path, formats=_FORMATS) as image:
        # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the result still has 8·32 pixels per side.
        image.draft("RGB", (8 * SIZE, 8 * SIZE))
        if image.mode.startswith("I"):  # 16-bit grey, which convert would clip at 255
            image = Image.fromarray(_to_8_bits(np.asarray(image).astype(np.int64)))
        elif image.mode == "F":
            raise ValueError("its pixels are floating-point numbers")
        image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _to_8_bits(grey: np.ndarray) -> np.ndarray:
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("its pixels have more than 16 bits")
    return ((grey + 128) // 257).astype(np.uint8)


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return f"not a {_KINDS.replace(', tif', ' or tif')} image"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).partition("\n")[0]


# --- the cache: 32 bytes key, 32 bytes SHA-256 of the pixels, the pixels


def _read_cache(path: Path, key: bytes, count: int) -> np.ndarray | None:
    """uint8 [count, 32, 32, 3], or None when the cache is missing, damaged, or made from other files."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError:
        return None
    head, pixels = content[:64].tobytes(), content[64:]
    if head[:32] != key:
        return None
    if head[32:] != hashlib.sha256(pixels).digest() or len(pixels) != count * SIZE * SIZE * 3:
        say(f"{path}: this cache is damaged; the images are decoded again")
        return None
    return pixels.reshape(count, SIZE, SIZE, 3)


def _write_cache(path: Path, key: bytes, images: np.ndarray) -> None:
    """Write the cache. Processes that start together all write, one after the other: the bytes are the same.

    A folder that cannot be written is no error: a note says that the images are decoded again.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        with locked(path.with_suffix(".lock")):
            write_atomic(path, key + hashlib.sha256(images).digest() + images.tobytes())
    except (InputError, OSError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        say(f"{path} cannot be written ({reason}): the images are decoded again at each start")
