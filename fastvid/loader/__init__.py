"""A batch plan, executed: uint8 images in memory -> augmented, normalised, channels-last batches on a device.

The images are reflect-padded once and live on the device. Two executors give equal bits:

    dali    one gather of cropped images, then one operator that mirrors and normalises, ahead of the step
    torch   one gather of the cropped and flipped pixels, then the arithmetic

Both compute (pixel - 255·mean) · (1 / (255·std)) and round every operation to fp32: on a CPU to the same
bits. On a GPU DALI computes a fused multiply-add, pixel · scale + (-255·mean·scale), which differs by about
2^-24 · (mean + 1)/std.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastvid.datasets.arrays import SIZE, Arrays
from fastvid.errors import InputError
from fastvid.loader.batch import Batch, EvalLoader, image_dtype
from fastvid.loader.dali_executor import DaliExecutor, dali_is_installed, dali_version
from fastvid.loader.torch_executor import TorchExecutor
from fastvid.plan import BatchPlan

__all__ = [
    "BACKENDS",
    "Batch",
    "EvalLoader",
    "TrainLoader",
    "choose_backend",
    "dali_is_installed",
    "describe",
    "train_loader",
]

BACKENDS = ("dali", "torch")


def train_loader(
    arrays: Arrays,
    plan: BatchPlan,
    *,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> TrainLoader:
    """Batches of `arrays` in the order, with the crops and with the flips of `plan`.

    arrays: images uint8 [n, 32, 32, 3].  backend: auto, dali or torch; the batches are the same.
    device: where the images and the batches live.  dtype: of the images, fp32 unless given.
    Raises InputError for an unknown backend or one that is not installed. Raises ValueError when plan and
    arrays differ in length, when images have another size or type, and when dtype is not floating-point.
    """
    chosen = choose_backend(backend)
    if plan.num_images != len(arrays):
        raise ValueError(f"the plan is for {plan.num_images} images, the arrays hold {len(arrays)}")
    if arrays.images.shape[1:] != (SIZE, SIZE, 3) or arrays.images.dtype != np.uint8:
        found = f"{arrays.images.dtype} {arrays.images.shape}"
        raise ValueError(f"train_loader wants images uint8 [n, {SIZE}, {SIZE}, 3], but they are {found}")
    executor = DaliExecutor if chosen == "dali" else TorchExecutor
    return TrainLoader(plan, executor(arrays, plan, torch.device(device), image_dtype(dtype)))


class TrainLoader:
    """Random access to the batches of a run; see train_loader. Nothing is rebuilt between epochs."""

    def __init__(self, plan: BatchPlan, executor: TorchExecutor | DaliExecutor):
        self.plan, self._executor = plan, executor

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch at `step` (0 .. steps_per_epoch - 1) of `epoch`. Raises IndexError outside.

        With several ranks, the share of one rank in a short last batch may be empty.
        """
        if epoch < 0 or not 0 <= step < self.plan.steps_per_epoch:
            raise self._no_step(epoch, step)
        return self._executor.batch(epoch, step)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from `start_step` (0 .. steps_per_epoch). Raises IndexError outside."""
        if epoch < 0 or not 0 <= start_step <= self.plan.steps_per_epoch:
            raise self._no_step(epoch, start_step)
        return (self.batch(epoch, step) for step in range(start_step, self.plan.steps_per_epoch))

    def _no_step(self, epoch: int, step: int) -> IndexError:
        return IndexError(f"no step {step} of epoch {epoch}: an epoch has {self.plan.steps_per_epoch} steps")


def choose_backend(backend: str) -> str:
    """dali or torch, for a value of --loader: auto takes DALI if it is installed. Raises InputError."""
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"unknown loader {backend!r}: choose from auto, {', '.join(BACKENDS)}")
    installed = dali_is_installed()
    if backend == "dali" and not installed:
        raise InputError(
            "--loader dali needs DALI: pip install nvidia-dali-cuda130 (Linux; nvidia-dali-cuda120 for "
            "CUDA 12), or take --loader torch, which gives the same batches"
        )
    return "dali" if installed and backend != "torch" else "torch"


def describe(backend: str) -> str:
    """The executor for a value of --loader in words, with its version. Raises InputError."""
    if choose_backend(backend) == "dali":
        return f"dali {dali_version()}".strip()
    return "torch" if dali_is_installed() else "torch (DALI is not installed)"
