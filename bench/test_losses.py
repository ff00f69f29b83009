"""Cost of the losses: plain PyTorch, torch.compile, and the Triton kernels, compared with a plain copy.

    python -m pytest bench/test_losses.py [--rows FILE.jsonl] [--dtype bf16] [--quick]

Shapes are those of a step of WRN-40-2 to WRN-16-1 at batch 128. Before a call is timed, its outputs are
compared with the float64 reference on the same inputs, launched in the same way. Outputs of a graph are
filled with NaN before the replay.

GPU times come from triton.testing.do_bench: between two events, after the L2 cache was overwritten. The time
of a call that the host launches includes the gaps in which the GPU waits for Python. The time of a graph
includes the start of the graph (microseconds). Part of the data that overwrote the L2 cache is still being
written to memory when the graph starts. Both effects are negligible in a graph of eight calls, each on its
own inputs. The rows of `copy` move as many bytes, launched in the same way: they show the bandwidth that each
launch can reach.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import lru_cache, partial, reduce
from operator import add

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clock import DEVICE, ON_GPU, gpu_microseconds, quantiles, synchronize, wall_microseconds
from torch import Tensor

from fastvid import kernels
from fastvid.config import TrainConfig
from fastvid.methods import build
from fastvid.step import GroupStep
from fastvid.student import Student
from fastvid.wresnet import TAPS, WideResNet, channels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TEACHER, STUDENT = dict(zip(TAPS, channels(2))), dict(zip(TAPS, channels(1)))
SIDE = dict(zip(TAPS, (32, 32, 16, 8)))
PARAMETERS = ("weight", "bias", "raw_scale")  # fp32; every other argument is a map or logits

OPS = {  # op: the taps where it is measured; `all` is the sum over taps in a training step
    "vid_nll": (*TAPS, "all"),
    "projected_vid_nll": (*TAPS, "all"),
    "attention_transfer": (*TAPS, "all"),
    "softened_kl": ("10", "100", "1000"),  # classes
    "mean_squared_error": ("group2",),  # FitNet's hint
}
QUICK = ("group2", "10")
IMPLEMENTATIONS = ("reference", "compile", "triton")
CONVOLUTION = "conv+triton"  # projected_vid_nll as a convolution and vid_nll, without its own kernel
HOST, GRAPH, EIGHT = "host", "graph", "graph-of-8"
# forward alone runs without gradients, as in evaluation; forward+backward is what training does
WAYS = [("forward", launch) for launch in (HOST, GRAPH)]
WAYS += [("forward+backward", launch) for launch in (HOST, GRAPH, EIGHT)]
# Norm of the error over norm of the reference. One rounding to bf16 gives 1e-3, to fp16 1.4e-4, a convolution
# in TF32 3e-4; the longest chain here has three of these. This only checks that all implementations compute
# the same function: the tests of the kernels have smaller tolerances.
TOLERANCES = {"bf16": 1e-2, "fp16": 1e-3, "fp32": 1e-3}


def pytest_generate_tests(metafunc):
    quick = metafunc.config.option.quick
    if metafunc.function is test_loss:
        cases = [
            (op, tap, impl, *way)
            for op, taps in OPS.items()
            for tap in taps
            if not quick or tap in QUICK
            for impl in implementations(op)
            for way in WAYS
        ]
        metafunc.parametrize("op, tap, impl, passes, launch", cases, ids=map("-".join, cases))
    elif metafunc.function is test_copy:
        metafunc.parametrize("launch", (HOST, GRAPH, EIGHT))
        metafunc.parametrize("tap", QUICK[:1] if quick else OPS["vid_nll"])


# The measured functions
def implementations(op: str) -> list[str]:
    return [*IMPLEMENTATIONS, CONVOLUTION] if op == "projected_vid_nll" else [*IMPLEMENTATIONS]


def shapes(op: str, tap: str, batch: int) -> list[dict[str, tuple]]:
    """Shapes of the arguments by name, for each loss of the sum (one loss, unless tap is `all`).

    The first argument and the parameters get gradients.
    """
    if tap == "all":
        taps = TAPS[1:] if op == "attention_transfer" else TAPS  # AT does not use the stem
        return [one for name in taps for one in shapes(op, name, batch)]
    if op == "softened_kl":
        return [dict.fromkeys(("student_logits", "teacher_logits"), (batch, int(tap)))]
    size, wide = (SIDE[tap], SIDE[tap]), TEACHER[tap]
    teacher = (batch, wide, *size)
    if op == "attention_transfer":
        return [{"student": (batch, STUDENT[tap], *size), "teacher": teacher}]
    if op == "mean_squared_error":
        return [{"prediction": teacher, "target": teacher}]
    target = {"target": teacher, "raw_scale": (wide,)}
    if op == "vid_nll":
        return [{"mean": teacher} | target]
    hidden = 2 * wide  # the hidden width of VIDLoss
    projection = {"hidden": (batch, hidden, *size), "weight": (wide, hidden, 1, 1), "bias": (wide,)}
    return [projection | target]


def least_bytes(arguments: list[dict[str, tuple]], passes: str, dtype: torch.dtype) -> int:
    """Smallest number of bytes to move: each map read once, the gradient of the first map written once.

    The modules of the kernels derive these numbers:

        vid_nll             2 maps forward, 3 with backward             vid.py
        projected_vid_nll   K + C channels of M rows, 2K + C            projected_vid.py
        attention_transfer  Cs + Ct channels of M rows, 2Cs + Ct        attention.py
        softened_kl         2BK logits, 3BK                             kd.py
        mean_squared_error  as vid_nll                                  vid.py

    In fp16, backward reads the maps again, because the scale of the gradient is unknown in forward
    (one_pass.py). Parameters and their gradients (at most 2.5 % of the maps: projection, group3) and partial
    sums, which stay in the L2 cache, are not counted.
    """
    maps = [[int(np.prod(one[name])) for name in one if name not in PARAMETERS] for one in arguments]
    read, written = sum(map(sum, maps)), sum(sizes[0] for sizes in maps)
    elements = read if passes == "forward" else read * (1 + (dtype == torch.float16)) + written
    return elements * dtype.itemsize


def draw(arguments: list[dict[str, tuple]], dtype: torch.dtype, seed: int) -> list[dict[str, Tensor]]:
    """Normal random inputs, with maps in channels-last.

    Parameters are rounded to `dtype` too, so that all implementations get the same values.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def tensor(name: str, shape: tuple, first: bool) -> Tensor:
        values = torch.randn(shape, generator=generator, device=DEVICE)
        if name == "weight":
            values /= shape[1] ** 0.5
        values = values.to(dtype).float() if name in PARAMETERS else values.to(dtype)
        values = values.to(memory_format=torch.channels_last) if len(shape) == 4 else values
        return values.requires_grad_(first or name in PARAMETERS)

    return [
        {name: tensor(name, shape, index == 0) for index, (name, shape) in enumerate(one.items())}
        for one in arguments
    ]


def total(loss: Callable) -> Callable:
    """The sum of a loss over taps, as in the loss modules."""
    return lambda inputs: reduce(add, [loss(**one) for one in inputs])


@lru_cache(maxsize=1)  # the tests of one implementation run one after another and share its compilation
def implementation(op: str, tap: str, impl: str) -> Callable:
    if impl == CONVOLUTION:
        return total(convolution_then_vid_nll)
    if impl == "compile":
        torch._dynamo.reset()  # the limit of recompilations counts all shapes of one function together
        reference = total(partial(getattr(kernels, op), impl="reference"))
        return torch.compile(reference, fullgraph=True, dynamic=False)
    return total(partial(getattr(kernels, op), impl=impl))


def convolution_then_vid_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, raw_scale: Tensor
) -> Tensor:
    mean = F.conv2d(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
    return kernels.vid_nll(mean, target, raw_scale, impl="triton")


def run(loss: Callable, inputs: list[dict[str, Tensor]], upstream: Tensor | None) -> list[Tensor]:
    """The loss, and with an upstream gradient also the gradients of all inputs that require them.

    The results hold no autograd graph: an autograd graph from another stream would break the next capture.
    """
    if upstream is None:
        with torch.no_grad():
            return [loss(inputs)]
    value = loss(inputs)
    differentiable = [tensor for one in inputs for tensor in one.values() if tensor.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, differentiable, upstream)]


def expected(op: str, inputs: list[dict[str, Tensor]], upstream: Tensor | None) -> list[Tensor]:
    """The right results of `run`, in float64."""

    def double(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    doubles = [{name: double(tensor) for name, tensor in one.items()} for one in inputs]
    reference = total(getattr(kernels.reference, op))
    return run(reference, doubles, None if upstream is None else upstream.double())


def copy(source: Tensor, target: Tensor) -> list[Tensor]:
    return [target.copy_(source)]


# The measurement
@lru_cache(maxsize=1)
def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def capture(calls: list[Callable]) -> tuple[torch.cuda.CUDAGraph, list[list[Tensor]]]:
    """One CUDA graph of all calls, and the outputs of the calls, which each replay overwrites."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up: compilation and everything that only a first call does
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # unloading an unused kernel would invalidate the capture
    try:
        with torch.cuda.graph(graph, stream=stream):
            outputs = [call() for call in calls]
    finally:
        gc.enable()
    return graph, outputs


def launched(calls: list[Callable], launch: str) -> tuple[Callable, list[list[Tensor]]]:
    """The function to time, and the outputs of its calls."""
    if launch == HOST:
        (call,) = calls
        return call, [call()]
    graph, outputs = capture(calls)
    for tensor in (tensor for tensors in outputs for tensor in tensors):
        tensor.fill_(float("nan"))
    graph.replay()
    return graph.replay, outputs


def assert_close(outputs: list[list[Tensor]], wanted: list[list[Tensor]], tolerance: float) -> None:
    for number, (given, right) in enumerate(zip(outputs, wanted, strict=True)):
        for index, (one, other) in enumerate(zip(given, right, strict=True)):
            error = ((one.double() - other).norm() / other.norm()).item()
            assert error <= tolerance, f"output {index} of call {number}: relative error {error:.2g}"


@pytest.fixture(scope="session")
def copy_gb_per_s(pytestconfig):
    """Bandwidth of a copy that is far larger than any cache, in GB/s of bytes read plus bytes written."""
    quick = pytestconfig.option.quick
    source = torch.rand((64 if quick else 512) << 18, device=DEVICE)  # MiB of fp32
    call = partial(copy, source, torch.empty_like(source))
    time_us = gpu_microseconds(call, quick) if ON_GPU else wall_microseconds(call, 3)
    return 2 * source.nbytes / time_us[0] / 1e3


@pytest.fixture
def measure(pytestconfig, benchmark, record, copy_gb_per_s):
    """measure(call, calls, moved, row): times `call` and records the row.

    `call` consists of `calls` calls of a function, each of which must move `moved` bytes.
    """
    quick = pytestconfig.option.quick
    rounds = 3 if quick else 50 if ON_GPU else 7

    def run_and_record(call: Callable, calls: int, moved: int, row: dict) -> None:
        gpu_us = [value / calls for value in gpu_microseconds(call, quick)] if ON_GPU else None
        benchmark.pedantic(lambda: (call(), synchronize()), rounds=rounds, warmup_rounds=1)
        wall_us = quantiles([1e6 * value / calls for value in benchmark.stats.stats.data])
        speed = moved / (gpu_us or wall_us)[0] / 1e3
        row |= {"l2": "cold" if ON_GPU else "not cleared", "gpu_us": gpu_us, "wall_us": wall_us}
        row |= {"bytes": moved, "gb_per_s": speed, "of_copy": speed / copy_gb_per_s}
        record(row | {"copy_gb_per_s": copy_gb_per_s})

    return run_and_record


@pytest.fixture
def batch(pytestconfig):
    return 8 if pytestconfig.option.quick else 128


def needs_gpu(what: str) -> None:
    if not ON_GPU:
        pytest.skip(f"no GPU here: {what} needs one")


def test_loss(op, tap, impl, passes, launch, pytestconfig, measure, batch):
    if impl in ("triton", CONVOLUTION):
        needs_gpu("a Triton kernel")
    if launch != HOST:
        needs_gpu("a CUDA graph")
    precision = pytestconfig.option.dtype
    dtype, arguments = DTYPES[precision], shapes(op, tap, batch)
    upstream = None
    if passes != "forward":  # training in fp16 scales the loss
        upstream = torch.tensor(65536.0 if precision == "fp16" else 1.0, device=DEVICE)
    sets = [draw(arguments, dtype, seed) for seed in range(8 if launch == EIGHT else 1)]
    loss = implementation(op, tap, impl)
    call, outputs = launched([partial(run, loss, inputs, upstream) for inputs in sets], launch)
    assert_close(outputs, [expected(op, inputs, upstream) for inputs in sets], TOLERANCES[precision])
    maps = [
        ",".join("x".join(map(str, shape)) for name, shape in one.items() if name not in PARAMETERS)
        for one in arguments
    ]
    row = {"op": op, "tap": tap, "shape": " + ".join(maps), "dtype": precision}
    row |= {"impl": impl, "pass": passes, "launch": launch}
    measure(call, len(sets), least_bytes(arguments, passes, dtype), row)


def test_copy(tap, launch, pytestconfig, measure, batch):
    """A copy of as many bytes as vid_nll moves in forward and backward."""
    if launch != HOST:
        needs_gpu("a CUDA graph")
    precision = pytestconfig.option.dtype
    moved = least_bytes(shapes("vid_nll", tap, batch), "forward+backward", DTYPES[precision])
    elements = moved // 8  # fp32; half of the bytes are read, half are written
    sources = [torch.rand(elements, device=DEVICE) for _ in range(8 if launch == EIGHT else 1)]
    call, outputs = launched([partial(copy, source, torch.empty_like(source)) for source in sources], launch)
    assert_close(outputs, [[source.double()] for source in sources], 0.0)
    row = {"op": "copy", "tap": tap, "shape": str(elements), "dtype": "fp32"}
    measure(call, len(sources), moved, row | {"impl": "torch", "pass": "copy", "launch": launch})


def test_share_of_the_losses_in_a_vid_step(pytestconfig, benchmark, record, batch):
    """Times a whole training step, and then its four vid_nll alone, without their convolutions."""
    precision, rounds = pytestconfig.option.dtype, 2 if pytestconfig.option.quick else 5
    torch.manual_seed(0)
    config = TrainConfig(method=("vid",), batch_size=batch, precision=precision).resolved()
    teacher, student = WideResNet(40, 2).eval(), WideResNet(16, 1)
    one = Student("vid", student, build("vid", config, student, teacher), config, DEVICE)
    step = GroupStep(teacher, [one], DEVICE, precision)
    step.begin_epoch(0.0)
    images = torch.randn(batch, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=DEVICE)
    benchmark.pedantic(lambda: (step(images, labels, 0.01), synchronize()), rounds=rounds, warmup_rounds=2)
    wall_us = quantiles([1e6 * value for value in benchmark.stats.stats.data])

    inputs = draw(shapes("vid_nll", "all", batch), DTYPES[precision], 0)
    losses = partial(run, total(kernels.vid_nll), inputs, torch.ones((), device=DEVICE))
    losses_us = wall_microseconds(losses, rounds)
    row = {"op": "vid_step", "tap": "all", "shape": f"{batch}x3x32x32", "dtype": precision, "impl": "auto"}
    row |= {"pass": "step", "launch": HOST, "l2": "not cleared", "gpu_us": None, "wall_us": wall_us}
    record(row | {"losses_us": losses_us, "losses_share": losses_us[0] / wall_us[0]})
