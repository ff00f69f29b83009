"""The batch plan in NVIDIA DALI: one gather of cropped images; one operator mirrors and normalises them."""

from __future__ import annotations

import sys
import threading
from collections import deque
from importlib import metadata
from importlib.util import find_spec

import numpy as np
import torch

from fastvid.datasets.arrays import SIZE, Arrays, reflect_pad
from fastvid.errors import InputError
from fastvid.loader.batch import Batch, constants, to_device
from fastvid.plan import MARGIN, BatchPlan, Plan

PREFETCH = 2  # batches that DALI prepares ahead: one is taken while another is made


def dali_is_installed() -> bool:
    """Whether DALI can be found. It is not imported."""
    if "nvidia.dali" in sys.modules:
        return sys.modules["nvidia.dali"] is not None
    return bool(find_spec("nvidia") and find_spec("nvidia.dali"))


def dali_version() -> str:
    """The version of the installed distribution, or an empty text when its metadata is missing."""
    names = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    return next((dist.version for name in names for dist in metadata.distributions(name=name)), "")


def dali():
    """(fn, pipeline_def, types) of nvidia.dali. Raises InputError if the import fails."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except (ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"DALI is installed but cannot be imported ({reason}): install the DALI for this machine, "
            "or uninstall it and take --loader torch"
        ) from error
    return fn, pipeline_def, types


class DaliExecutor:
    """One DALI pipeline for the whole run. It prepares the next ones, and drops them if another is wanted."""

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
        # Work that this stream does on the images waits for DALI.
        stream = [torch.cuda.current_stream(self._source.device)] if self._source.stream else []
        with self._one_at_a_time:
            self._source.seek(wanted)
            number = None
            while number != wanted:
                (images,) = self._pipeline.run(*stream)
                number, labels = self._source.taken()
        # DALI keeps the memory as long as the tensor lives.
        images = torch.from_dlpack(images.as_tensor()).to(self._dtype)
        return Batch(images.permute(0, 3, 1, 2), labels)


class _DaliSource:
    """The inputs of the pipeline: cropped images of the next batch of the plan, and their flips.

    The crop is part of the gather. That copies fewer bytes than whole padded images, and DALI checks one
    parameter less per image: a fifth faster. DALI reads the arrays in place and later, so the latest ones are
    kept alive.
    """

    def __init__(self, arrays: Arrays, plan: BatchPlan, device: torch.device):
        self._plan, self.device = plan, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        pool, self._labels = reflect_pad(arrays.images, MARGIN), arrays.labels
        count, offsets, row = len(pool), 2 * MARGIN + 1, 3 * pool.shape[2]  # row: bytes
        shape, strides = (count, offsets, offsets, SIZE, 3 * SIZE), (row * pool.shape[1], row, 3, row, 1)
        if self.stream is None:
            # A view of every crop of every image.
            self._windows = np.lib.stride_tricks.as_strided(pool, shape, strides, writeable=False)
        else:
            self._windows = torch.from_numpy(pool).to(device).as_strided(shape, strides)
            self._labels = torch.from_numpy(self._labels).to(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # for the pool
        self._next = 0  # number of a batch, counted from the first of epoch 0
        self._in_pipeline: deque[tuple[int, torch.Tensor]] = deque()
        self._images: deque = deque()
        self._flips: deque = deque()
        self._kept: deque = deque(maxlen=PREFETCH + 3)  # one more than the pipeline can hold

    def seek(self, number: int) -> None:
        """Make batch `number` next, unless DALI is already preparing it."""
        if number not in (other for other, _ in self._in_pipeline):
            self._next = number

    def taken(self) -> tuple[int, torch.Tensor]:
        """Number and labels of the batch that DALI has just returned."""
        number, labels = self._in_pipeline.popleft()
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
        if not self._plan.size(step):  # DALI takes no empty batch, and only the last of an epoch can be empty
            epoch, step = epoch + 1, 0
        plan = self._plan.batch(epoch, step)
        images, labels = self._gather(plan)
        flips = plan.flip.astype(np.int32)
        number = epoch * self._plan.steps_per_epoch + step
        self._next = number + 1
        self._in_pipeline.append((number, labels))
        self._images.append(images)
        self._flips.append(flips)
        self._kept.append((images, flips))

    def _gather(self, plan: Plan) -> tuple[np.ndarray | torch.Tensor, torch.Tensor]:
        """Cropped images, uint8 [B, 32, 32, 3], and labels."""
        if self.stream is None:
            images = self._windows[plan.indices, plan.top, plan.left]
            return images.reshape(-1, SIZE, SIZE, 3), torch.from_numpy(self._labels[plan.indices])
        with torch.cuda.stream(self.stream):
            indices, top, left = to_device(np.stack(plan[:3]), self.device)
            return self._windows[indices, top, left].view(-1, SIZE, SIZE, 3), self._labels[indices]


def _build_pipeline(source: _DaliSource, arrays: Arrays, batch_size: int):
    """uint8 [B, 32, 32, 3] -> mirrored and normalised, fp32 [B, 32, 32, 3]."""
    fn, pipeline_def, types = dali()
    on_gpu = source.stream is not None
    mean, std = constants(arrays)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=min(2, torch.get_num_threads()),
        prefetch_queue_depth=PREFETCH,
        exec_dynamic=True,  # this executor counts references: a batch that is held is not overwritten
        device_id=torch.empty(0, device=source.device).get_device() if on_gpu else None,
    )
    def pipeline():
        # On a GPU only a copy (393 KB per batch, on our stream) makes DALI read after we have written.
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
    except RuntimeError as error:  # DALI was built for another CUDA version, or the driver is too old
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"DALI cannot run on {source.device} ({reason}): "
            "take --loader torch, which gives the same batches"
        ) from error
    return built
