"""How one step executes: the teacher once, then every student's forward, losses, backward and update.

    eager     operator by operator
    compile   torch.compile fuses each student's forward, losses and backward, and the teacher
    graph     the compiled step, captured whole in one CUDA graph: students on parallel streams, one launch per step

All three are the same few lines, GroupStep._run. Compiling, warming up and capturing leave no trace in the training: what they
change is put back. Their seconds are counted apart.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from fastvid import signals
from fastvid.device import DTYPES, autocast, synchronize
from fastvid.distributed import ALONE, Ranks
from fastvid.errors import InputError
from fastvid.learner import Learner
from fastvid.loader import EvalLoader
from fastvid.progress import say
from fastvid.wresnet import Activations, WideResNet, frozen

LONG = 5000  # steps
WARM_UP = 3  # steps before a capture: libraries choose algorithms, load kernels and take workspaces in the first ones


class Mode(NamedTuple):
    """The two choices behind an engine's name."""

    compiled: bool
    captured: bool


ENGINES = {"eager": Mode(False, False), "compile": Mode(True, False), "graph": Mode(True, True)}


def choose_engine(name: str, device: torch.device, steps: int, ranks: Ranks = ALONE) -> str:
    """The engine of this --engine for a training of so many steps. Raises InputError where it cannot run.

    auto: graph on a GPU. On a CPU compile for at least LONG steps, where torch.compile works: oneDNN's convolutions are most of a step and
    stay as they are, so it takes thousands of steps to win back the minute or two of a first compilation. Several ranks: eager, for a
    captured step cannot wait for others, and compiling has not been measured there.
    """
    if name == "auto":
        if ranks.world_size > 1:
            return "eager"
        if device.type == "cuda":
            return "graph" if find_spec("triton") else "eager"
        return "compile" if steps >= LONG and _compiler_works() else "eager"
    if name == "graph" and device.type != "cuda":
        raise InputError(
            f"--engine graph captures a CUDA graph, and the device is {device}: take --engine auto"
        )
    if name != "eager" and ranks.world_size > 1:
        raise InputError(
            f"--engine {name} is for one process, and torchrun has started several: take --engine auto"
        )
    if name != "eager" and device.type == "cuda" and not find_spec("triton"):
        raise InputError(f"--engine {name} needs Triton on a GPU: pip install triton, or take --engine eager")
    return name


@cache
def _compiler_works() -> bool:
    """Whether torch.compile works on this CPU, which takes more than a compiler: tried on one addition, a few seconds."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        return False
    try:
        torch.compile(lambda number: number + 1, dynamic=False)(torch.zeros(1))
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, OSError) as error:
        say(
            f"torch.compile does not work here ({str(error).strip().partition(chr(10))[0]}): the engine is eager"
        )
        return False
    return True


class GroupStep:
    """One step of all students of a group, on the same batch and from the same teacher forward.

    engine: a key of ENGINES, or a Mode.  batch_size: of the batches that are worth a compilation, a minute each; none: all. The short last
    one of an epoch is not.  preparation_seconds: spent on compiling, warming up and capturing so far.
    """

    def __init__(
        self,
        teacher: WideResNet | None,
        learners: list[Learner],
        device: torch.device,
        precision: str,
        engine: str | Mode = "eager",
        ranks: Ranks = ALONE,
        batch_size: int | None = None,
    ):
        self.learners, self.device, self.precision, self.batch_size = learners, device, precision, batch_size
        self.mode = ENGINES[engine] if isinstance(engine, str) else engine
        self.preparation_seconds = 0.0
        self._teacher = self._eager_teacher = teacher and frozen(teacher, DTYPES[precision]).to(device)
        self._learning_rate: float | None = None
        self._prepared: dict[tuple, Callable[[Tensor, Tensor], None]] = {}
        self._counts: dict[tuple[Learner, EvalLoader], Callable[[], Tensor]] = {}
        self._streams = [
            _stream(device, 1 + number) if self.mode.captured else None for number in range(len(learners))
        ]
        if self.mode.captured:
            self._pool = (
                torch.cuda.graph_pool_handle()
            )  # shared: the graphs of full and of short batches never run at once
        if self.mode.compiled:
            dynamo = (
                torch._dynamo.config
            )  # its limit counts the variants of all learners together, and what lies beyond is an error
            dynamo.recompile_limit = max(dynamo.recompile_limit, 256)
            self._teacher = self._teacher and torch.compile(self._teacher, fullgraph=True, dynamic=False)
            for learner in learners:
                learner.compile()
        if ranks.world_size > 1:
            for learner in learners:
                learner.distribute(ranks)

    def begin_epoch(self, progress: float, fresh: bool = True) -> None:
        """Before each epoch, with the share of the training that is done. fresh: no step of it was made by an earlier start."""
        for learner in self.learners:
            if fresh:
                learner.loss_sums.zero_()
            learner.network.train()
            learner.method.train()
            learner.method.begin_epoch(progress)

    def __call__(self, images: Tensor, labels: Tensor, learning_rate: float, weight: float = 1.0) -> None:
        """images: [B, 3, 32, 32] channels-last.  labels: int64 [B].  weight: of this rank's batch among those of all ranks."""
        if not len(
            labels
        ):  # of a rank that a short last batch leaves out: it takes part with an image that weighs nothing
            images = images.new_zeros(1, *images.shape[1:]).contiguous(memory_format=torch.channels_last)
            labels = labels.new_zeros(1)
        if learning_rate != self._learning_rate:
            self._learning_rate = learning_rate
            for learner in self.learners:
                learner.set_learning_rate(learning_rate)
        if self.mode == ENGINES["eager"]:
            self._run(images, labels, weight)
            return
        key = (len(labels), weight, *(learner.method.phase() for learner in self.learners))
        if key not in self._prepared:
            self._prepared[key] = self._timed(lambda: self._prepare(images, labels, weight))
        self._prepared[key](images, labels)

    def _run(self, images: Tensor, labels: Tensor, weight: float) -> None:
        compiled = self.mode.compiled and self.batch_size in (None, len(labels))
        taught = self._teach(images, self._teacher if compiled else self._eager_teacher)
        for learner, stream in zip(self.learners, self._streams):
            with _beside(stream):
                learner.step(images, taught, labels, weight, eager=self.mode.compiled and not compiled)
        for stream in filter(None, self._streams):
            torch.cuda.current_stream().wait_stream(stream)

    @torch.no_grad()
    def _teach(self, images: Tensor, teacher: WideResNet | None) -> Activations | None:
        if teacher is None:
            return None
        with record_function("teacher: forward"):
            return teacher(images.to(DTYPES[self.precision]))

    def _prepare(self, images: Tensor, labels: Tensor, weight: float) -> Callable[[Tensor, Tensor], None]:
        """What executes batches of this size from now on."""

        def run(images: Tensor, labels: Tensor) -> None:
            self._run(images, labels, weight)

        with self.rehearsal(), _naming_failed_compilation():
            if self.mode.captured:
                return _Captured(run, images, labels, device=self.device, pool=self._pool, warm_up=WARM_UP)
            with signals.leaving_at_once():
                run(images, labels)
            return run

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps inside leave no trace in the training: what they change is put back."""
        tensors = [tensor for learner in self.learners for tensor in learner.tensors()]
        before, scalers = (
            [tensor.detach().clone() for tensor in tensors],
            [learner.scaler.state_dict() for learner in self.learners],
        )
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(tensors, before)
            for learner, scaler in zip(self.learners, scalers):
                learner.optimizer.zero_grad(set_to_none=True)
                learner.scaler.load_state_dict(scaler)

    def explain_failure(self, learner: Learner, images: Tensor, labels: Tensor) -> str | None:
        """What is not finite when `learner`, which stands still since then, makes its first failed step again."""
        return learner.first_not_finite(images, self._teach(images, self._eager_teacher), labels)

    def accuracy(self, learner: Learner, loader: EvalLoader) -> float:
        """As evaluate, for a learner of this group: captured, it is one launch."""
        if not self.mode.captured:
            return evaluate(learner.network, loader, self.device, self.precision)
        key = learner, loader  # held as long as its graph reads them
        if key not in self._counts:
            self._counts[key] = self._timed(lambda: self._capture_count(learner, loader))
        return 100 * self._counts[key]().item() / loader.num_images

    def _capture_count(self, learner: Learner, loader: EvalLoader) -> Callable[[], Tensor]:
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        graph = _Captured(
            lambda: correct.copy_(_count(learner.network, loader, self.device, self.precision)),
            device=self.device,
            pool=self._pool,
            warm_up=1,
        )

        def count() -> Tensor:
            graph()
            return correct

        return count

    def _timed(self, prepare: Callable[[], Callable]) -> Callable:
        synchronize(self.device)
        started = time.perf_counter()
        prepared = prepare()
        synchronize(self.device)
        self.preparation_seconds += time.perf_counter() - started
        return prepared


class _Captured:
    """A function of tensors, recorded once as a CUDA graph and replayed on new contents of the same shapes."""

    def __init__(
        self,
        function: Callable[..., object],
        *inputs: Tensor,
        device: torch.device,
        pool: tuple[int, int],
        warm_up: int,
    ):
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        stream = _stream(device, 0)
        with _beside(stream):
            with signals.leaving_at_once():
                for _ in range(warm_up):
                    function(*self._inputs)
        torch.cuda.synchronize()
        gc.collect()  # an old graph that is freed during a capture would break it
        with torch.cuda.graph(
            self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):  # DALI's threads work on
            function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> None:
        for mine, given in zip(self._inputs, inputs):
            mine.copy_(given)
        self._graph.replay()


@contextmanager
def _naming_failed_compilation() -> Iterator[None]:
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"torch.compile failed ({reason}): take --engine eager, or see whether the compiler works"
        ) from error


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """The same ones for the whole process: torch has 32 and deals them in turn, so that new ones would come to be shared."""
    return torch.cuda.Stream(device)


def _beside(stream: torch.cuda.Stream | None):
    """A context whose work runs on `stream`, after what the current stream holds now; without one, where it is."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def evaluate(network: WideResNet, loader: EvalLoader, device: torch.device, precision: str) -> float:
    """Top-1 accuracy in percent, in eval mode."""
    return 100 * _count(network, loader, device, precision).item() / loader.num_images


@torch.no_grad()
def _count(network: WideResNet, loader: EvalLoader, device: torch.device, precision: str) -> Tensor:
    """How many images the network names correctly, int64 scalar."""
    was_training = network.training
    network.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in loader:
        with autocast(device, precision):
            logits = network(images).logits
        correct += (logits.argmax(dim=1) == labels).sum()
    network.train(was_training)
    return correct
