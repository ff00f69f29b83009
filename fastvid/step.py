"""Execution of one step: the teacher once, then forward, losses, backward and update of every student.

    eager     operator by operator
    compile   torch.compile fuses each student's forward, losses and backward, and the teacher
    graph     the compiled step, captured in one CUDA graph: students on parallel streams, one launch per step

All three run the same few lines, GroupStep._run. Compilation, warm-up and capture do not affect the training:
the tensors that they change are restored, and their seconds are counted separately.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from fastvid.device import DTYPES, autocast
from fastvid.errors import InputError
from fastvid.loader import EvalLoader
from fastvid.progress import say
from fastvid.stopwatch import Stopwatch
from fastvid.student import Student
from fastvid.wresnet import Activations, WideResNet, frozen

LONG = 5000  # steps of a training for which compilation pays off on a CPU
WARM_UP = 3  # steps before a capture, in which libraries choose algorithms, load kernels, allocate workspaces


class Mode(NamedTuple):
    """The two choices behind the name of an engine."""

    compiled: bool
    captured: bool


ENGINES = {"eager": Mode(False, False), "compile": Mode(True, False), "graph": Mode(True, True)}


def choose_engine(name: str, device: torch.device, steps: int) -> str:
    """The engine that --engine `name` means for a training of `steps` steps.

    "auto" is graph on a GPU. On a CPU "auto" is compile for LONG steps or more, if torch.compile works:
    convolutions dominate a step and stay in oneDNN, so that thousands of steps are needed to regain the one
    or two minutes of the first compilation.
    Raises InputError if the engine cannot run on `device`.
    """
    if name == "auto":
        if device.type == "cuda":
            return "graph" if find_spec("triton") else "eager"
        return "compile" if steps >= LONG and _compiler_works() else "eager"
    if name == "graph" and device.type != "cuda":
        raise InputError(
            f"--engine graph captures a CUDA graph, but the device is {device}: take --engine auto"
        )
    if name != "eager" and device.type == "cuda" and not find_spec("triton"):
        raise InputError(f"--engine {name} needs Triton on a GPU: pip install triton, or take --engine eager")
    return name


@cache
def _compiler_works() -> bool:
    """Whether torch.compile works on this CPU. Compiles one addition to find out (a few seconds)."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        return False
    try:
        torch.compile(lambda number: number + 1, dynamic=False)(torch.zeros(1))
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        say(f"torch.compile does not work here ({reason}): the engine is eager")
        return False
    return True


class GroupStep:
    """One step of all students of a group, on the same batch and with one forward pass of their teacher.

    students: a student that is removed from this list is no longer trained.
    engine: a key of ENGINES, or a Mode.
    batch_size: only batches of this size are compiled (about a minute each); None compiles every size. The
        short last batch runs eagerly.
    clock: compilation, warm-up and capture count as its part "preparation".
    """

    def __init__(
        self,
        teacher: WideResNet | None,
        students: list[Student],
        device: torch.device,
        precision: str,
        engine: str | Mode = "eager",
        batch_size: int | None = None,
        clock: Stopwatch | None = None,
    ):
        self.students, self.device, self.precision, self.batch_size = students, device, precision, batch_size
        self.mode = ENGINES[engine] if isinstance(engine, str) else engine
        self.clock = clock or Stopwatch(device)
        self._teacher = self._eager_teacher = teacher and frozen(teacher, DTYPES[precision]).to(device)
        self._learning_rate: float | None = None
        self._prepared: dict[tuple, Callable[[Tensor, Tensor], object]] = {}
        if self.mode.captured:
            self._pool = torch.cuda.graph_pool_handle()  # one pool: full and short batches never run at once
        if self.mode.compiled:
            dynamo = torch._dynamo.config  # its limit counts the variants of all students together
            dynamo.recompile_limit = max(dynamo.recompile_limit, 256)
            self._teacher = self._teacher and torch.compile(self._teacher, fullgraph=True, dynamic=False)
            for student in students:
                student.compile()

    def begin_epoch(self, progress: float) -> None:
        """Call this before each epoch and after a resume. progress: share of the training that is done."""
        for student in self.students:
            student.module.train()
            student.method.begin_epoch(progress)

    def __call__(self, images: Tensor, labels: Tensor, learning_rate: float) -> None:
        """Take one step.  images: [B, 3, 32, 32] channels-last.  labels: int64 [B]."""
        if learning_rate != self._learning_rate:
            self._learning_rate = learning_rate
            for student in self.students:
                student.set_learning_rate(learning_rate)
        if self.mode == ENGINES["eager"]:
            self._run(images, labels)
            return
        key = len(labels), *((student.name, student.method.phase()) for student in self.students)
        if key not in self._prepared:
            with self.clock.part("preparation"):
                self._prepared[key] = self._prepare(images, labels)
        self._prepared[key](images, labels)

    def _run(self, images: Tensor, labels: Tensor) -> None:
        compiled = self.mode.compiled and self.batch_size in (None, len(labels))
        teacher_activations = self._teach(images, self._teacher if compiled else self._eager_teacher)
        count = len(self.students)
        streams = [_stream(self.device, 1 + number) for number in range(count if self.mode.captured else 0)]
        for student, stream in zip(self.students, streams or [None] * count):
            with _beside(stream):
                student.step(images, teacher_activations, labels, eager=not compiled)
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)

    @torch.no_grad()
    def _teach(self, images: Tensor, teacher: WideResNet | None) -> Activations | None:
        if teacher is None:
            return None
        with record_function("teacher: forward"):
            return teacher(images.to(DTYPES[self.precision]))

    def _prepare(self, images: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], object]:
        """Compile the step for batches of this size, and capture the step if the engine captures."""
        with self.rehearsal(), _explain_failed_compilation():
            if self.mode.captured:
                return _Captured(self._run, images, labels, device=self.device, pool=self._pool)
            self._run(images, labels)
            return self._run

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps inside this block do not affect the training: all tensors that they change are restored."""
        tensors = [tensor for student in self.students for tensor in student.tensors()]
        before = [tensor.detach().clone() for tensor in tensors]
        scalers = [student.scaler.state_dict() for student in self.students]
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(tensors, before)
            for student, scaler in zip(self.students, scalers):
                student.optimizer.zero_grad(set_to_none=True)
                student.scaler.load_state_dict(scaler)


class _Captured:
    """A function of tensors, captured once as a CUDA graph and replayed on new values of the same shapes."""

    def __init__(
        self,
        function: Callable[..., object],
        *inputs: Tensor,
        device: torch.device,
        pool: tuple[int, int],
        warm_up: int = WARM_UP,
    ):
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        stream = _stream(device, 0)
        with _beside(stream):
            for _ in range(warm_up):
                function(*self._inputs)
        torch.cuda.synchronize()
        gc.collect()  # freeing an old graph during a capture would invalidate the capture
        # thread_local, because the threads of DALI keep working during the capture
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> None:
        for static, given in zip(self._inputs, inputs):
            static.copy_(given)
        self._graph.replay()


@contextmanager
def _explain_failed_compilation() -> Iterator[None]:
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        message = f"torch.compile failed ({reason}): take --engine eager, or check the compiler"
        raise InputError(message) from error


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """Stream `number`, cached: torch hands out 32 streams in turn, so new streams could coincide."""
    return torch.cuda.Stream(device)


def _beside(stream: torch.cuda.Stream | None):
    """A context that works on `stream`, after the work queued on the current stream. None: no change."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def evaluate(network: WideResNet, loader: EvalLoader, device: torch.device, precision: str) -> float:
    """Top-1 accuracy of `network` in percent, in eval mode."""
    return 100 * _count_correct(network, loader, device, precision).item() / loader.num_images


@torch.no_grad()
def _count_correct(network: WideResNet, loader: EvalLoader, device: torch.device, precision: str) -> Tensor:
    was_training = network.training
    network.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in loader:
        with autocast(device, precision):
            logits = network(images).logits
        correct += (logits.argmax(dim=1) == labels).sum()
    network.train(was_training)
    return correct
