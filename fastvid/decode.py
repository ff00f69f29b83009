"""Image files -> uint8 [n, 32, 32, 3], RGB, decoded by Pillow.

The largest centred square of an image of another size is scaled to 32x32 (bicubic, antialiased).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastvid.errors import InputError
from fastvid.progress import say

SIZE = 32  # pixels per side, of every data set


def dali_is_installed() -> bool:
    if "nvidia.dali" in sys.modules:
        return sys.modules["nvidia.dali"] is not None
    return bool(find_spec("nvidia") and find_spec("nvidia.dali"))


def dali():
    """What we use of nvidia.dali: (fn, pipeline_def, types). Raises InputError where it is installed but does not start."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except (ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"DALI is installed but cannot be imported ({reason}): install the one for this machine, or uninstall it and "
            "take --loader torch"
        ) from error
    return fn, pipeline_def, types


def images(paths: Sequence[Path]) -> np.ndarray:
    """All of them, in this order. Raises InputError that names the first one that is damaged."""
    if len(paths) >= 1000:  # a minute's work: a log file shall say what is going on
        say(f"decoding {len(paths):,} images")
    decoded = np.empty((len(paths), SIZE, SIZE, 3), np.uint8)
    with tqdm(
        total=len(paths),
        desc="decoding",
        unit=" images",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    ) as bar:
        for index, image in enumerate(map(_by_pillow, paths)):
            decoded[index] = image
            bar.update()
    return decoded


def _by_pillow(path: Path) -> np.ndarray:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError("--dataset folder needs Pillow: pip install pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transparency that RGB drops, of EXIF that nobody reads
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                if image.mode.startswith("I"):  # 16-bit grey, which convert would clip at 255
                    image = Image.fromarray(
                        ((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8)
                    )
                image = image.convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # Pillow reports damage as any of these
        raise _unreadable(path) from error
    if image.size != (SIZE, SIZE):
        image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _unreadable(path: Path) -> InputError:
    return InputError(f"{path}: not a readable PNG or JPEG image: replace or remove it")
