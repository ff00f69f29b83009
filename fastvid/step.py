"""How one step executes: the teacher once, then the forward, losses, backward and update of every student.

    eager     operator by operator
    compile   torch.compile fuses each student's forward, losses and backward, and the teacher
    graph     the compiled step, captured in one CUDA graph: students on parallel streams, one launch per step

All three run the same few lines, GroupStep._run. Compiling, warming up and capturing leave no trace in the training: the
tensors that they change are restored, and their seconds are counted apart.
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

LONG = 5000  # steps
WARM_UP = (
    3  # steps before a capture: libraries choose algorithms, load kernels and allocate workspaces in them
)


class Mode(NamedTuple):
    """The two choices behind the name of an engine."""

    compiled: bool
    captured: bool


ENGINES = {"eager": Mode(False, False), "compile": Mode(True, False), "graph": Mode(True, True)}


def choose_engine(name: str, device: torch.device, steps: int) -> str:
    """The engine that --engine `name` means for a training of `steps` steps. Raises InputError where it cannot run.

    auto is graph on a GPU. On a CPU it is compile from LONG steps on, if torch.compile works there: convolutions are most of
    a step and stay in oneDNN, so it takes thousands of steps to win back the minute or two of a first compilation.
    """
    if name == "auto":
        if device.type == "cuda":
            return "graph" if find_spec("triton") else "eager"
        return "compile" if steps >= LONG and _compiler_works() else "eager"
    if name == "graph" and device.type != "cuda":
        raise InputError(
            f"--engine graph captures a CUDA graph, and the device is {device}: take --engine auto"
        )
    if name != "eager" and device.type == "cuda" and not find_spec("triton"):
        raise InputError(f"--engine {name} needs Triton on a GPU: pip install triton, or take --engine eager")
    return name


@cache
def _compiler_works() -> bool:
    """Whether torch.compile works on this CPU. It needs more than a compiler, so one addition is compiled: a few seconds."""
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

    students: a student that is removed from this list takes no further part.  engine: a key of ENGINES, or a Mode.
    batch_size: only batches of this size are compiled (about a minute each), None compiles every size; the short last batch
    runs eagerly.  clock: compilation, warm-up and capture count as its part "preparation".
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
            self._pool = torch.cuda.graph_pool_handle()  # shared: full and short batches never run at once
        if self.mode.compiled:
            dynamo = torch._dynamo.config  # the limit counts the variants of all students together
            dynamo.recompile_limit = max(dynamo.recompile_limit, 256)
            self._teacher = self._teacher and torch.compile(self._teacher, fullgraph=True, dynamic=False)
            for student in students:
                student.compile()

    def begin_epoch(self, progress: float) -> None:
        """Called before each epoch, and after a resume, with the share of the training that is done."""
        for student in self.students:
            student.module.train()
            student.method.begin_epoch(progress)

    def __call__(self, images: Tensor, labels: Tensor, learning_rate: float) -> None:
        """images: [B, 3, 32, 32] channels-last.  labels: int64 [B]."""
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
        streams = [
            _stream(self.device, 1 + number) for number in range(len(self.students) * self.mode.captured)
        ]
        for student, stream in zip(self.students, streams or [None] * len(self.students)):
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
        """Compile, and capture if this engine does, the step for batches of this size."""
        with self.rehearsal(), _explain_failed_compilation():
            if self.mode.captured:
                return _Captured(self._run, images, labels, device=self.device, pool=self._pool)
            self._run(images, labels)
            return self._run

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps inside this block leave no trace in the training: the tensors that they change are restored."""
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
    """A function of tensors, recorded once as a CUDA graph and replayed on new contents of the same shapes."""

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
        gc.collect()  # an old graph that is freed during a capture would break it
        # thread_local: the threads of DALI go on meanwhile
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
        raise InputError(
            f"torch.compile failed ({reason}): take --engine eager, or see whether the compiler works"
        ) from error


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """The same streams for the whole process: torch has 32 and deals them in turn, so new ones would come to be shared."""
    return torch.cuda.Stream(device)


def _beside(stream: torch.cuda.Stream | None):
    """A context whose work runs on `stream`, after the work that the current stream holds now. None: no change."""
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
