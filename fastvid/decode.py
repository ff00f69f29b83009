"""Files of images -> uint8 [n, 32, 32, 3], RGB: decoded by DALI where it is installed, else by Pillow.

Of an image of another size the largest square in its middle is scaled (bicubic, antialiased). JPEG files and 8-bit PNG files of 32x32
pixels give equal arrays either way; 16-bit colours differ by one of the 255 levels, scaled photographs by a few.
"""

from __future__ import annotations

import os
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastvid.errors import InputError
from fastvid.progress import say

SIZE = 32  # pixels per side, of every data set
_BATCH = 64  # images that DALI decodes at a time


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


def decoder() -> str:
    """What decodes on this machine: dali or pillow."""
    return "dali" if dali_is_installed() else "pillow"


def images(paths: Sequence[Path]) -> np.ndarray:
    """All of them, in this order. Raises InputError that names the first one that is damaged."""
    if len(paths) >= 1000:  # a minute's work: a log file shall say what is going on
        say(f"decoding {len(paths):,} images by {decoder()}")
    decoded = np.empty((len(paths), SIZE, SIZE, 3), np.uint8)
    with tqdm(
        total=len(paths),
        desc="decoding",
        unit=" images",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    ) as bar:
        for index, image in enumerate(_by_dali(paths) if decoder() == "dali" else map(_by_pillow, paths)):
            decoded[index] = image
            bar.update()
    return decoded


def _by_dali(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    for (
        path
    ) in paths:  # first: DALI 2.4 may end the process where a batch holds a file whose header it cannot read
        if not _has_structure(path.read_bytes()):
            raise _unreadable(path)
    pipeline = _pipeline(paths, _BATCH)
    for first in range(0, len(paths), _BATCH):
        part = paths[first : first + _BATCH]
        try:
            with _native_messages_hidden():
                (images,) = pipeline.run()
        except RuntimeError:
            for path in part:  # one by one: DALI does not say which
                _check(path)
            raise
        yield from np.asarray(images.as_tensor())[: len(part)]


def _has_structure(content: bytes) -> bool:
    """Whether these bytes are a PNG file with whole chunks, or a JPEG file with whole segments up to its pixels."""
    try:
        return _is_png(content) if content[:4] == b"\x89PNG" else _is_jpeg(content)
    except (struct.error, IndexError):  # the file ends too early
        return False


def _is_png(content: bytes) -> bool:
    """Signature, IHDR first, IEND last, and the CRC of each chunk (PNG specification, section 5)."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[8:16] != b"\0\0\0\rIHDR":
        return False
    position, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, position)
        (checksum,) = struct.unpack_from(">I", content, position + 8 + length)
        if checksum != zlib.crc32(memoryview(content)[position + 4 : position + 8 + length]):
            return False
        position += length + 12
    return True


def _is_jpeg(content: bytes) -> bool:
    """SOI, then segments up to SOS, among them a frame of 8-bit samples with a size and its components (ITU-T T.81, annex B)."""
    if content[:2] != b"\xff\xd8":
        return False
    position, sized = 2, False
    while True:
        if content[position] != 0xFF:
            return False
        while content[position] == 0xFF:  # fill bytes
            position += 1
        marker = content[position]
        (length,) = struct.unpack_from(">H", content, position + 1)
        if marker == 0xDA:
            return sized and length == 6 + 2 * content[position + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width, components = struct.unpack_from(">BHHB", content, position + 3)
            sized = (
                precision == 8
                and height > 0
                and width > 0
                and components in (1, 3, 4)
                and length == 8 + 3 * components
            )
            if not sized:
                return False
        position += 1 + length


def _check(path: Path) -> None:
    try:
        with _native_messages_hidden():
            _pipeline([path], 1).run()
    except RuntimeError as error:
        raise _unreadable(path) from error


def _pipeline(paths: Sequence[Path], batch_size: int):
    """DALI from files to uint8 [batch_size, 32, 32, 3], without a batch ahead: an error belongs to the batch that was asked for."""
    fn, pipeline_def, types = dali()

    @pipeline_def(
        batch_size=batch_size,
        num_threads=len(os.sched_getaffinity(0)),
        device_id=None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    def pipeline():
        encoded, _ = fn.readers.file(
            files=list(map(str, paths)), dont_use_mmap=True
        )  # a file that shrinks would end the process
        image = fn.decoders.image(
            encoded, output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
        )  # as Pillow does
        size = fn.slice(image.shape(dtype=types.FLOAT), 0, 2, axes=[0])
        side = fn.reductions.min(size)
        corner = (size - side) / 2
        return fn.resize(
            image,
            size=[SIZE, SIZE],
            roi_start=corner,
            roi_end=corner + side,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )

    return pipeline()


def _by_pillow(path: Path) -> np.ndarray:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError(
            "--dataset folder needs Pillow: pip install pillow, or on Linux DALI: pip install nvidia-dali-cuda130"
        ) from error
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


@contextmanager
def _native_messages_hidden() -> Iterator[None]:
    """The decoders write their own account of a damaged file, in colour, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
