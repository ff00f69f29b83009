"""A batch plan, executed: uint8 images in memory -> augmented, normalised, channels-last batches on a device.

The pool is reflect-padded once and lives on the device. Two executors give equal bits:

    dali    one gather of cropped images, then mirror and normalise in one DALI operator, ahead of the training step
    torch   one gather of the cropped and flipped pixels, then the arithmetic

Both compute (pixel - 255·mean) · (1 / (255·std)), every operation rounded to fp32: on a CPU to the same bits. On a GPU DALI takes a
fused multiply-add, pixel · scale + (-255·mean·scale), which differs by some 2^-24 · (mean + 1)/std.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch

from fastvid.datasets.arrays import SIZE, Arrays, reflect_pad
from fastvid.errors import InputError
from fastvid.plan import MARGIN, BatchPlan, Plan

BACKENDS = ("dali", "torch")
PREFETCH = 2  # batches that DALI prepares ahead: one is taken while another is made


class Batch(NamedTuple):
    """images: [B, 3, 32, 32] channels-last, normalised.  labels: int64 [B]."""

    images: torch.Tensor
    labels: torch.Tensor


def dali_is_installed() -> bool:
    """Whether DALI can be found. It is not imported."""
    if "nvidia.dali" in sys.modules:
        return sys.modules["nvidia.dali"] is not None
    return bool(find_spec("nvidia") and find_spec("nvidia.dali"))


def dali():
    """The parts of nvidia.dali that we use: (fn, pipeline_def, types). Raises InputError if the import fails."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except (ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"DALI is installed but cannot be imported ({reason}): install the DALI for this machine, "
            "or uninstall it and take --loader torch"
        ) from error
    return fn, pipeline_def, types


def choose_backend(backend: str) -> str:
    """What executes the plan for this --loader: auto takes DALI where it is installed. Raises InputError for one that is not there."""
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"unknown loader {backend!r}: choose from auto, {', '.join(BACKENDS)}")
    installed = dali_is_installed()
    if backend == "dali" and not installed:
        raise InputError(
            "--loader dali needs DALI: pip install nvidia-dali-cuda130 (Linux; nvidia-dali-cuda120 for CUDA 12), "
            "or take --loader torch, which gives the same batches"
        )
    return "dali" if installed and backend != "torch" else "torch"


def describe(backend: str) -> str:
    """The executor of this --loader in words, with its version."""
    if choose_backend(backend) == "torch":
        return "torch" if dali_is_installed() else "torch (DALI is not installed)"
    versions = (
        dist.version
        for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
        for dist in metadata.distributions(name=name)
    )
    return f"dali {next(versions, '')}".strip()


def train_loader(
    arrays: Arrays,
    plan: BatchPlan,
    *,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> TrainLoader:
    """Batches of `arrays` as `plan` orders, crops and flips them.

    arrays: images uint8 [n, 32, 32, 3].  backend: auto, dali or torch; the batches are the same.
    device: where the pool and the batches live.  dtype: of the images, fp32 unless given.
    Raises InputError for an unknown backend or one that is not installed, ValueError when plan and arrays differ in length or
    images are of another size or type.
    """
    chosen = choose_backend(backend)
    if plan.num_images != len(arrays):
        raise ValueError(f"the plan is for {plan.num_images} images, the arrays hold {len(arrays)}")
    if arrays.images.shape[1:] != (SIZE, SIZE, 3) or arrays.images.dtype != np.uint8:
        found = f"{arrays.images.dtype} {arrays.images.shape}"
        raise ValueError(f"train_loader wants images uint8 [n, {SIZE}, {SIZE}, 3], but they are {found}")
    executor = _DaliExecutor if chosen == "dali" else _TorchExecutor
    return TrainLoader(plan, executor(arrays, plan, torch.device(device), dtype or torch.float32))


class TrainLoader:
    """`for images, labels in loader.epoch(e)`; see train_loader. One for a whole run: nothing is rebuilt between epochs."""

    def __init__(self, plan: BatchPlan, executor: _TorchExecutor | _DaliExecutor):
        self.plan, self._executor = plan, executor

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from `start_step` on. A rank that a short last batch leaves out gets an empty one.

        Raises IndexError for an epoch or a step below 0, or a step beyond the end.
        """
        if epoch < 0 or not 0 <= start_step <= self.plan.steps_per_epoch:
            raise IndexError(
                f"no step {start_step} of epoch {epoch}: an epoch has {self.plan.steps_per_epoch} steps"
            )
        return (self._executor.batch(epoch, step) for step in range(start_step, self.plan.steps_per_epoch))


class _TorchExecutor:
    """Plain PyTorch, on any device."""

    def __init__(self, arrays: Arrays, plan: BatchPlan, device: torch.device, dtype: torch.dtype):
        self._plan, self._device = plan, device
        padded = reflect_pad(arrays.images, MARGIN)
        self._padded_size = padded.shape[1]
        self._pixels = _rgbx(padded).to(device)
        self._labels = torch.from_numpy(arrays.labels).to(device)
        self._normalise = _Normaliser(arrays, device, dtype)
        self._column = torch.arange(SIZE, device=device)

    def batch(self, epoch: int, step: int) -> Batch:
        plan = self._plan.batch(epoch, step)
        indices, top, left, flip = _to_device(
            np.stack(plan), self._device
        )  # one transfer; bool becomes 0 and 1
        size = self._padded_size
        columns = left[:, None] + torch.where(
            flip[:, None] == 1, SIZE - 1 - self._column, self._column
        )  # [B, 32]
        rows = (
            indices[:, None] * size + top[:, None] + self._column
        ) * size  # [B, 32], first pixel of each row
        pixels = self._pixels.take(rows[:, :, None] + columns[:, None, :])
        return Batch(self._normalise(pixels), self._labels[indices])


class _DaliExecutor:
    """One DALI pipeline for the whole run. It prepares the batches that follow; where another is asked for, those are dropped."""

    def __init__(self, arrays: Arrays, plan: BatchPlan, device: torch.device, dtype: torch.dtype):
        self._plan, self._dtype = plan, dtype
        self._source = _DaliSource(arrays, plan, device)
        self._one_at_a_time = threading.Lock()  # DALI hangs where two threads run a pipeline
        self._pipeline = _build_pipeline(self._source, arrays, -(-plan.batch_size // plan.world_size))

    def batch(self, epoch: int, step: int) -> Batch:
        if not self._plan.size(step):
            labels = torch.empty(0, dtype=torch.int64, device=self._source.device)
            return Batch(labels.new_empty(0, 3, SIZE, SIZE, dtype=self._dtype), labels)
        wanted = epoch * self._plan.steps_per_epoch + step
        stream = (
            [torch.cuda.current_stream(self._source.device)] if self._source.stream else []
        )  # its work on the images waits for DALI
        with self._one_at_a_time:
            self._source.seek(wanted)
            number = None
            while number != wanted:
                (images,) = self._pipeline.run(*stream)
                number, labels = self._source.taken()
        images = torch.from_dlpack(images.as_tensor()).to(self._dtype)  # valid as long as it is held
        return Batch(images.permute(0, 3, 1, 2), labels)


class _DaliSource:
    """What DALI asks for its input: the images of the next batch of the plan, cropped, and their flips.

    The crop is part of the gather: it copies fewer bytes than whole padded images, and a parameter less for DALI to check for each of
    them made the pipeline a fifth faster. DALI reads the arrays in place and later, so they are kept for a while.
    """

    def __init__(self, arrays: Arrays, plan: BatchPlan, device: torch.device):
        self._plan, self.device = plan, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        pool, self._labels = reflect_pad(arrays.images, MARGIN), arrays.labels
        count, offsets, row = len(pool), 2 * MARGIN + 1, 3 * pool.shape[2]  # row: bytes
        shape, strides = (count, offsets, offsets, SIZE, 3 * SIZE), (row * pool.shape[1], row, 3, row, 1)
        if self.stream is None:
            self._windows = np.lib.stride_tricks.as_strided(
                pool, shape, strides, writeable=False
            )  # every crop of every image: a view
        else:
            self._windows = torch.from_numpy(pool).to(device).as_strided(shape, strides)
            self._labels = torch.from_numpy(self._labels).to(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # for the pool
        self._next = 0  # number of a batch, counted from the first of epoch 0
        self._under_way: deque[tuple[int, torch.Tensor]] = deque()
        self._images: deque = deque()
        self._flips: deque = deque()
        self._kept: deque = deque(maxlen=PREFETCH + 3)  # one more than can be under way

    def seek(self, number: int) -> None:
        """This batch comes: unless it is under way, it is the next one to be made."""
        if number not in (other for other, _ in self._under_way):
            self._next = number

    def taken(self) -> tuple[int, torch.Tensor]:
        """Number and labels of the batch that DALI has just given out."""
        number, labels = self._under_way.popleft()
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            labels.record_stream(current)
        return number, labels

    def images(self) -> np.ndarray | torch.Tensor:
        if not self._images:
            self._make()
        return self._images.popleft()

    def flips(self) -> np.ndarray:
        if not self._flips:
            self._make()
        return self._flips.popleft()

    def _make(self) -> None:
        epoch, step = divmod(self._next, self._plan.steps_per_epoch)
        if not self._plan.size(step):  # DALI knows no empty batch; only the last one of an epoch can be empty
            epoch, step = epoch + 1, 0
        plan = self._plan.batch(epoch, step)
        images, labels = self._gather(plan)
        flips = plan.flip.astype(np.int32)
        number = epoch * self._plan.steps_per_epoch + step
        self._next = number + 1
        self._under_way.append((number, labels))
        self._images.append(images)
        self._flips.append(flips)
        self._kept.append((images, flips))

    def _gather(self, plan: Plan) -> tuple[np.ndarray | torch.Tensor, torch.Tensor]:
        """Cropped images, uint8 [B, 32, 32, 3], and labels."""
        if self.stream is None:
            images = self._windows[plan.indices, plan.top, plan.left]
            return images.reshape(-1, SIZE, SIZE, 3), torch.from_numpy(self._labels[plan.indices])
        with torch.cuda.stream(self.stream):
            indices, top, left = _to_device(np.stack(plan[:3]), self.device)
            return self._windows[indices, top, left].view(-1, SIZE, SIZE, 3), self._labels[indices]


def _build_pipeline(source: _DaliSource, arrays: Arrays, batch_size: int):
    """uint8 [B, 32, 32, 3] -> mirrored and normalised, fp32 [B, 32, 32, 3]."""
    fn, pipeline_def, types = dali()
    on_gpu = source.stream is not None
    mean, std = _constants(arrays)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=min(2, torch.get_num_threads()),
        prefetch_queue_depth=PREFETCH,
        exec_dynamic=True,  # the executor that counts references: what is held is not overwritten
        device_id=torch.empty(0, device=source.device).get_device() if on_gpu else None,
    )
    def pipeline():
        # On a GPU DALI orders its reading after our writing only where it copies: 393 KB a batch, on our stream.
        images = fn.external_source(
            source=source.images,
            layout="HWC",
            device="gpu" if on_gpu else "cpu",
            no_copy=not on_gpu,
            cuda_stream=source.stream,
        )
        flips = fn.external_source(source=source.flips, no_copy=True)
        return fn.crop_mirror_normalize(
            images, mirror=flips, mean=mean.tolist(), std=std.tolist(), output_layout="HWC", dtype=types.FLOAT
        )

    built = pipeline()
    try:
        built.build()
    except RuntimeError as error:  # a DALI of another CUDA, or a driver that is too old for it
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"DALI cannot run on {source.device} ({reason}): take --loader torch, which gives the same batches"
        ) from error
    return built


class EvalLoader:
    """Every image once, in order, unaugmented, with the normalisation of training: `for images, labels in loader`."""

    def __init__(
        self,
        arrays: Arrays,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ):
        device = torch.device(device)
        self._pixels = _rgbx(arrays.images).view(-1, SIZE, SIZE).to(device)
        self._labels = torch.from_numpy(arrays.labels).to(device)
        self._normalise = _Normaliser(arrays, device, dtype or torch.float32)
        self.batch_size, self.num_images = batch_size, len(arrays)

    def __iter__(self) -> Iterator[Batch]:
        for pixels, labels in zip(self._pixels.split(self.batch_size), self._labels.split(self.batch_size)):
            yield Batch(self._normalise(pixels), labels)


class _Normaliser:
    """int32 pixels [B, 32, 32] -> [B, 3, 32, 32] channels-last, without a copy after the arithmetic."""

    def __init__(self, arrays: Arrays, device: torch.device, dtype: torch.dtype):
        mean, std = _constants(arrays)
        self._mean, self._scale = (torch.from_numpy(values).to(device) for values in (mean, 1 / std))
        self._dtype = dtype

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        rgb = pixels.view(torch.uint8).view(*pixels.shape, 4)[..., :3]
        images = (rgb.float() - self._mean).mul_(self._scale).to(self._dtype)
        return images.permute(0, 3, 1, 2)


def _to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The host does not wait for a GPU."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _constants(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """255·mean and 255·std per channel, fp32."""
    return (255 * np.array(arrays.mean)).astype(np.float32), (255 * np.array(arrays.std)).astype(np.float32)


def _rgbx(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> int32 [n·H·W]: a pixel in one word, so that a gather moves one element per pixel."""
    words = np.zeros((*images.shape[:3], 4), dtype=np.uint8)
    words[..., :3] = images
    return torch.from_numpy(words.view(np.int32).reshape(-1))
