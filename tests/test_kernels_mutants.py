"""Mutation tests of the losses: each fault of faults.py is seeded into a copy of the kernels, and must be
found.

The oracle is independent of the reference: float64 autograd of formulas that are written here. Launches are
cut so small that small maps have several tiles, programs, slices and blocks of channels. Every tensor lies
between two walls of known numbers, so that a dropped mask reads NaN or breaks a wall.
"""

import importlib
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import fastvid.kernels
import interpreter
import pytest
import torch
import torch.nn.functional as F
from faults import FAULTS
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        interpreter.DEVICE != "cpu",
        reason="a fault may write beyond a tensor, which on a GPU would end the process",
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy warns about NaN and inf
]

KERNELS = Path(fastvid.kernels.__file__).parent
WALL = 1 << 12  # elements before and after each tensor, more than a wrong mask or stride strays
# A loss: 1e-5, because fp32 rounds logarithms, differences, products and sums by 2^-24 each. A gradient,
# relative to its largest element: one rounding in the dot, one of the result, and as much again for what
# cancels.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


# --- memory between walls


class Walled:
    """Allocate as torch does, but filled with NaN. A wall alternates between NaN and the number of its
    tensor."""

    def __init__(self):
        self.buffers = []

    def place(self, shape, stride, dtype) -> Tensor:
        size = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if all(shape) else 0
        buffer = torch.full((size + 2 * WALL,), math.nan, dtype=dtype)
        self.buffers.append(buffer)
        buffer[1:WALL:2] = buffer[1 - WALL :: 2] = len(self.buffers)
        return buffer.as_strided(shape, stride, WALL)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.place(tensor.shape, tensor.stride(), tensor.dtype).copy_(tensor)

    def empty(self, *shape, dtype=torch.float32, device=None) -> Tensor:
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        return self.place(shape, [math.prod(shape[i + 1 :]) for i in range(len(shape))], dtype)

    def check(self):
        for number, buffer in enumerate(self.buffers, start=1):
            for wall in (buffer[:WALL], buffer[-WALL:]):
                assert wall[::2].isnan().all() and (wall[1::2] == number).all(), "written beyond a tensor"

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch, "empty", self.empty)
        self.patch.setattr(torch, "empty_like", lambda x: self.place(x.shape, x.stride(), x.dtype))
        self.patch.setattr(
            Tensor,
            "new_empty",
            lambda x, *shape, dtype=None, device=None: self.empty(*shape, dtype=dtype or x.dtype),
        )
        return self

    def __exit__(self, *_):
        self.patch.undo()


# --- the oracle: formulas in float64


def vid_nll(mean, target, raw_scale, eps=1e-5):
    variance = torch.log1p(raw_scale.exp()) + eps
    return F.gaussian_nll_loss(mean, target, variance.view(1, -1, 1, 1).expand_as(mean), eps=1e-30)


def mean_squared_error(prediction, target):
    return (prediction - target).pow(2).mean()


def projected_vid_nll(hidden, weight, bias, target, raw_scale, eps=1e-5):
    mean = torch.einsum("ck,bkhw->bchw", weight[:, :, 0, 0], hidden)
    return vid_nll(mean if bias is None else mean + bias.view(1, -1, 1, 1), target, raw_scale, eps)


def attention_transfer(student, teacher):
    energies = (x.pow(2).mean(1).flatten(1) for x in (student, teacher))
    student, teacher = (energy / energy.norm(dim=1, keepdim=True).clamp_min(1e-12) for energy in energies)
    return (student - teacher).pow(2).mean()


def softened_kl(student, teacher, temperature=4.0):
    p, q = ((x / temperature - (x / temperature).amax(1, keepdim=True)).exp() for x in (teacher, student))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return temperature**2 / len(p) * (p * (p / q).log()).sum()


class Case(NamedTuple):
    formula: object
    tensors: tuple  # a gradient is computed for those that require one
    options: dict  # eps or temperature
    factor: float
    upstream: tuple[float, float]  # for a first and a second backward


@cache
def cases() -> dict[str, Case]:
    """Cases by name. The part before the comma is the module whose faults a case should catch."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    generator = torch.Generator().manual_seed(0)
    # Gradients are below the smallest number of fp16 until they are multiplied by upstream.
    scaled = {"factor": 1e-6, "upstream": (65536.0, 32768.0)}

    def last(tensor):  # channels-last, but a weight keeps its strides
        maps = tensor.dim() == 4 and tensor.shape[2:] != (1, 1)
        return tensor.to(memory_format=torch.channels_last) if maps else tensor

    def draw(*shape, dtype=fp32):
        return last(torch.randn(shape, generator=generator).to(dtype))

    def whole(*shape, dtype=fp32):  # -1, 0 and 1: a mean of them is exact in 16 bits
        return last(torch.randint(-1, 2, shape, generator=generator).to(dtype))

    def pair(*shape, dtype=fp32):
        return draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)

    def case(formula, *tensors, wanted=(), factor=1.0, upstream=(0.5, 3.0), **options):
        for position in wanted:
            tensors[position].requires_grad_()
        return Case(formula, tensors, options, factor, upstream)

    vid, mse, projected, at, kd = (
        vid_nll,
        mean_squared_error,
        projected_vid_nll,
        attention_transfer,
        softened_kl,
    )
    half, holed = {"factor": 0.5, "eps": 0.1}, draw(2, 3, 2, 3)
    holed[0, 1, 0, 0] = math.nan
    wide = draw(5, 13) + torch.tensor([-1000.0, 1000.0, 0.0, 0.0, -1000.0])[:, None]
    tiny = torch.tensor([3e-7, 0.0, 1e-7]).view(3, 1, 1, 1)  # norms below 1e-12
    far = last(torch.full((1, 3, 2, 2), 300.0, dtype=fp16)), last(torch.zeros(1, 3, 2, 2, dtype=fp16))
    large, shapes = torch.cat((torch.tensor([30.0]), draw(11))), (1, 5, 3, 5)
    small, mixed = torch.tensor([-17.0, -12.0]), torch.tensor([math.nan, 0.5, -0.5])
    sliced = whole(1, 20, 6, 7, dtype=bf16), whole(12, 20, 1, 1), whole(12), draw(1, 12, 6, 7, dtype=bf16)
    fp16s = whole(1, 20, 5, 7, dtype=fp16), whole(20, 12, 1, 1).transpose(0, 1), whole(12)
    bare = whole(1, 16, 3, 3, dtype=bf16), whole(16, 16, 1, 1), None, draw(1, 16, 3, 3, dtype=bf16)
    learned = whole(1, 4, 3, 3, dtype=bf16), whole(3, 4, 1, 1), whole(3), draw(1, 3, 3, 3, dtype=bf16)
    loud = (300 * draw(2, 5, 3, 4)).to(fp16)
    return {
        "vid, blocks": case(vid, *pair(1, 12, 3, 6, dtype=bf16), large, wanted=(0, 2), **half),
        "vid, squared error": case(
            mse, *pair(*shapes, dtype=bf16), wanted=(0, 1), factor=0.5, upstream=(3.0, 0.5)
        ),
        "vid, fp16": case(vid, *pair(*shapes, dtype=fp16), draw(5), wanted=(0, 1, 2), eps=0.1, **scaled),
        "vid, small variances": case(vid, *pair(1, 2, 3, 3), small, wanted=(0, 2)),
        "vid, residuals of 300": case(vid, *far, draw(3)),
        "vid, NaN": case(vid, holed, draw(2, 3, 2, 3), mixed, wanted=(0, 2)),
        "vid, strided scale": case(vid, *pair(2, 3, 2, 3), draw(3, 2)[:, 1], wanted=(0, 1), eps=0.1),
        "vid, empty": case(vid, *pair(0, 3, 2, 2), draw(3)),
        "projected_vid, slices": case(projected, *sliced, draw(12), wanted=(0, 1, 2, 4), **half),
        "projected_vid, fp16": case(
            projected, *fp16s, draw(1, 12, 5, 7, dtype=fp16), draw(12), wanted=(0, 1, 2, 4), **scaled
        ),
        "projected_vid, no bias": case(projected, *bare, draw(16)),
        "projected_vid, wanted target": case(projected, *learned, draw(3), wanted=(0, 1, 2, 3, 4), **half),
        "attention, in registers": case(at, *pair(2, 5, 3, 4), wanted=(0, 1), factor=0.5),
        "attention, tiles": case(
            at, draw(2, 12, 3, 4, dtype=bf16), draw(2, 5, 3, 4, dtype=bf16), wanted=(0,), factor=0.5
        ),
        "attention, fp16": case(
            at, last(loud), draw(2, 3, 3, 4, dtype=fp16), wanted=(0,), upstream=(65536.0, 32768.0)
        ),
        "attention, tiny": case(at, last(tiny * draw(3, 5, 3, 4)), draw(3, 3, 3, 4), wanted=(0,)),
        "attention, tiny tiles": case(at, last(tiny * draw(3, 12, 3, 4)), draw(3, 3, 3, 4), wanted=(0,)),
        "kd, strided": case(
            kd, wide[:, :10], 3 * draw(5, 17)[:, :10], wanted=(0, 1), factor=0.5, temperature=3.0
        ),
        "kd, fp16": case(kd, *pair(2, 10, dtype=fp16), wanted=(0, 1), temperature=3.0, **scaled),
    }


def results(function, tensors, upstream) -> Iterator[Tensor]:
    """The loss, then the gradients of two backward passes over the same graph, read after both."""
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    loss = function(*tensors)
    yield loss.detach()
    gradients = [
        torch.autograd.grad(loss, wanted, torch.full_like(loss, each), retain_graph=True, allow_unused=True)
        for each in upstream
        if wanted
    ]
    yield from (gradient for each in gradients for gradient in each)


def leaves(tensors, convert):
    return tuple(t if t is None else convert(t.detach()).requires_grad_(t.requires_grad) for t in tensors)


@cache
def expected(name) -> list[Tensor]:
    formula, tensors, options, factor, upstream = cases()[name]
    return list(
        results(lambda *args: factor * formula(*args, **options), leaves(tensors, Tensor.double), upstream)
    )


def verify(package, name, impl) -> None:
    """Raise AssertionError if an implementation of this package differs from the formula."""
    formula, tensors, options, factor, upstream = cases()[name]
    with Walled() as memory:
        if impl == "equation":
            tensors, function = (
                leaves(tensors, lambda t: memory.copy(t.double())),
                getattr(package.reference, formula.__name__),
            )
            found = results(lambda *args: factor * function(*args, **options), tensors, upstream)
        else:
            tensors, function = leaves(tensors, memory.copy), getattr(package, formula.__name__)
            found = results(
                lambda *args: function(*args, **options, factor=factor, impl=impl), tensors, upstream
            )
        precision = TOLERANCE[tensors[0].dtype]
        for position, (got, want) in enumerate(zip(found, expected(name), strict=True)):
            assert got is not None, "no gradient"
            tolerance = (precision if position else min(precision, 1e-5)) * want.nan_to_num(
                0
            ).abs().max().item()
            torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance, equal_nan=True)
    memory.check()


def verify_rescale(package) -> None:
    """Check rescale with several programs, sizes that are and are not divisible by 16, and many
    parameters."""
    for size in (4640, 4099):
        with Walled() as memory:
            gradient, parameters = memory.copy(torch.ones(size)), memory.copy(torch.ones(2500))
            scaled = package.one_pass.rescale(gradient, parameters, torch.tensor(0.5))
        assert (gradient == 0.5).all() and (scaled == 0.5).all()
        memory.check()


def verify_all(package, module="") -> None:
    """Verify all cases: those of `module` first, and those that need no interpreter first."""
    runs = [(name, impl) for impl in ("equation", "reference", "auto", "triton") for name in cases()]
    for name, impl in sorted(runs, key=lambda run: (run[0].split(",")[0] != module, run[1] == "triton")):
        verify(package, name, impl)
    verify_rescale(package)


def load(folder: Path, name: str, module="", occurrence=0, text="", replacement=""):
    """A copy of the kernels as a package of another name, with operators of its own, one fault, and small
    launches."""
    (folder / name).mkdir()
    for path in KERNELS.glob("*.py"):
        source = path.read_text()
        if path.stem == module:
            parts, number = source.split(text), occurrence or 1
            if len(parts) <= number or (len(parts) > 2 and not occurrence):
                pytest.fail(
                    f"kernels/{module}.py has {text!r} {len(parts) - 1} times: change tests/faults.py"
                )
            source = text.join(parts[:number]) + replacement + text.join(parts[number:])
        source = source.replace("fastvid.kernels", name).replace("fastvid::", f"{name}::")
        (folder / name / path.name).write_text(source)
    package = importlib.import_module(name)
    cuts = {
        key: cut | {"BLOCK_ROWS": 16, "SLICE": 16, "programs": 2}
        for key, cut in package.projected_vid._CUTS.items()
    }
    for part, constants in (
        (package.vid, {"_TILE": 32, "_WIDEST": 8, "_PROGRAMS": 6, "_FINISH_TILE": 32, "_BLOCK_WEIGHTS": 32}),
        (package.projected_vid, {"_CUTS": cuts}),
        (package.attention, {"_IN_REGISTERS": 128, "_TILE": 64, "_POSITIONS": 8}),
        (package.kd, {"_TILE": 32}),
    ):
        assert vars(part).keys() >= constants.keys(), (
            f"{part.__name__} no longer has all of {list(constants)}"
        )
        vars(part).update(constants)
    return package


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """`load` into the folder of this test. The copy is removed from sys.modules afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"mutant_of_{tmp_path.name}"  # of its own: torch.library registers operators once
    yield lambda *fault: load(tmp_path, name, *fault)
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


def test_the_oracle_passes_a_copy_without_a_fault(copied):
    verify_all(copied())


@pytest.mark.parametrize("fault", FAULTS, ids="{0[0]}-{0[1]}".format)
def test_the_oracle_catches_a_seeded_fault(fault, copied):
    module, _, *change = fault
    package = copied(module, *change)
    with pytest.raises(AssertionError):  # any other error would show without the oracle
        verify_all(package, module)
