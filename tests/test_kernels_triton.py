"""The Triton losses against float64: the loss and every gradient, on chosen and drawn inputs, layouts and
uses.

Without a GPU they run in Triton's interpreter, on a GPU natively: the same tests with the same tolerances.
"""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastvid.kernels import attention, kd, one_pass, projected_vid, vid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from torch import Tensor
from triton.runtime import interpreter

from fastvid import kernels

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
CL = torch.channels_last
OPS = ("vid_nll", "mean_squared_error", "projected_vid_nll", "attention_transfer", "softened_kl")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy warns about NaN and inf, which are meant
]
CONVOLVED = (
    "projected_vid_nll",
    "softened_kl",
)  # a convolution refuses maps without positions; logits have none
each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=["fp32", "bf16", "fp16"])
only_interpreted = pytest.mark.skipif(
    DEVICE != "cpu", reason="moves the program index, which only the interpreter lets it"
)


@pytest.fixture(scope="module", autouse=True)
def quick_and_balanced_interpreter():
    """Make the interpreter five times as fast: patch Triton's language once instead of for every function,
    and do not check integers for overflow, which cannot occur in small maps. Make its sums as exact as those
    of a GPU, which adds the rows of a tile in a tree: NumPy adds them one after the other unless they are
    contiguous."""
    if DEVICE != "cpu":
        yield
        return
    patch, scopes, builder, nothing = (
        interpreter._patch_lang,
        {},
        interpreter.interpreter_builder,
        interpreter._LangPatchScope(),
    )

    def patch_once(function):
        if (
            id(function.__globals__) not in scopes
        ):  # it patches those modules of the language that a file has imported
            scopes[id(function.__globals__)] = patch(function)
        return nothing

    def add(self, x):
        axis = range(x.handle.data.ndim) if self.axis is None else [self.axis]
        side_by_side = np.ascontiguousarray(np.moveaxis(x.handle.data, axis, range(-len(axis), 0)))
        total = side_by_side.sum(tuple(range(-len(axis), 0)))
        return self.to_tensor(np.expand_dims(total, tuple(axis)) if self.keep_dims else total, x.dtype)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.ReduceOps, "sum", add)
        monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield
    for scope in reversed(scopes.values()):
        scope.restore()


# --- inputs, and how they are used


def draw(*shape, dtype=fp32, times=1.0, seed=0):
    """Finite normal numbers times `times`; a map is channels-last."""
    drawn = times * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    drawn = drawn.clamp(-65504, 65504).to(DEVICE, dtype)  # the largest number of fp16
    return drawn.contiguous(memory_format=CL) if len(shape) == 4 else drawn


def inputs_of(
    op,
    shape,
    *,
    dtype=fp32,
    other=None,
    times=1.0,
    teacher_times=None,
    near=None,
    channels=None,
    bias=True,
    raw=(-2.0, 2.0),
    seed=0,
):
    """Every input of `op` by name. `other`: dtype of the teacher's side. `near`: the teacher's numbers are
    the student's times 1 + near·n, where the shapes allow it. `channels`: of the teacher's map (attention),
    or of the hidden map (projected)."""
    other, teacher_times = other or dtype, teacher_times or times
    batch, width, *positions = shape

    def maps(first, second, student_shape=shape, teacher_shape=shape):
        student, teacher = (
            draw(*student_shape, dtype=dtype, times=times, seed=seed),
            draw(*teacher_shape, seed=seed + 1),
        )
        if near is None or student_shape != teacher_shape:
            teacher = teacher_times * teacher
        else:
            teacher = student.float() * (1 + near * teacher)
        return {first: student, second: teacher.clamp(-65504, 65504).to(other)}

    scale = raw[0] + (raw[1] - raw[0]) * torch.rand(
        width, generator=torch.Generator().manual_seed(seed + 2)
    ).to(DEVICE, other)
    if op == "vid_nll":
        return {**maps("mean", "target"), "raw_scale": scale}
    if op == "mean_squared_error":
        return maps("prediction", "target")
    if op == "attention_transfer":
        return maps("student", "teacher", teacher_shape=(batch, channels or width, *positions))
    if op == "softened_kl":
        return maps("student_logits", "teacher_logits")
    hidden = channels or 2 * width
    both = maps("hidden", "target", student_shape=(batch, hidden, *positions))
    return {
        "hidden": both["hidden"],
        "weight": draw(width, hidden, 1, 1, dtype=other, times=hidden**-0.5, seed=seed + 3),
        "bias": draw(width, dtype=other, times=times, seed=seed + 4) if bias else None,
        "target": both["target"],
        "raw_scale": scale,
    }


LAYOUTS = {  # how a map or logits reach the loss: the leaves that hold the numbers, and what is made of them
    "dense": (lambda x: [x], lambda x: x),
    "part": (
        lambda x: [F.pad(x, (0, 3)) if x.dim() == 2 else torch.cat((x[:1], x)).contiguous(memory_format=CL)],
        lambda whole: whole[:, :-3] if whole.dim() == 2 else whole[1:],
    ),
    "cat": (lambda x: [x[:1], x[1:]], lambda *parts: _dense(torch.cat(parts))),
    "transposed": (
        lambda x: [x.t().contiguous() if x.dim() == 2 else x.permute(0, 2, 3, 1).contiguous()],
        lambda x: x.t().contiguous() if x.dim() == 2 else x.permute(0, 3, 1, 2),
    ),
}
UPSTREAM = {
    "1": (1, lambda loss: loss),
    "65536": (65536, lambda loss: loss * 65536),
    "stride-0": (3, lambda loss: loss.expand(3).sum()),
}


def _dense(x):
    return (
        x.contiguous(memory_format=CL) if x.dim() == 4 else x
    )  # as it is, but where one channel or one position leaves it open


def learners(inputs):
    """What usually learns: everything that is there, but for the target of a projection, which would take it
    out of the kernel."""
    return [
        name
        for name, value in inputs.items()
        if value is not None and not (name == "target" and "hidden" in inputs)
    ]


def evaluate(op, inputs, *, impl="triton", wanted=None, layout="dense", upstream="1", **options):
    """The loss, and the gradients of what is wanted, by name."""
    wanted = learners(inputs) if wanted is None else wanted
    leaves, used, build = {}, {}, {}
    for name, value in inputs.items():
        take, build[name] = LAYOUTS[
            "dense" if value is None or name in ("weight", "bias", "raw_scale") else layout
        ]
        leaves[name] = [
            leaf if leaf is None else leaf.detach().clone().requires_grad_(name in wanted)
            for leaf in take(value)
        ]
        used[name] = build[name](*leaves[name])
    loss = getattr(kernels, op)(**used, impl=impl, **options)
    gradients = iter(
        torch.autograd.grad(UPSTREAM[upstream][1](loss), [leaf for name in wanted for leaf in leaves[name]])
    )
    return {
        "loss": loss.detach(),
        **{name: build[name](*(next(gradients) for _ in leaves[name])) for name in wanted},
    }


# --- how exact a result has to be
#
# exact: the same function in float64 on the same rounded inputs.  eager: the reference on the same inputs and
# dtypes. magnitude: what exact would be had nothing cancelled, Σ |terms|; in fp32 each term is off by some
# roundings of 2^-24, relative to it. A difference of inputs is exact but for one rounding, so |mean - target|
# is its own magnitude; a difference of computed values is not; a term counts as often as the variance divides
# it; a logarithm turns the relative error of its argument into an absolute one, hence the "+ 1". coarse: Σ of
# the ulps of all 16-bit roundings on the way. The unit of error of an element is one fp32 ulp of its
# magnitude, and a quarter of its 16-bit ulps, so that 4 units hold two 16-bit roundings, to nearest: of the
# gradient, and of its product with upstream. Then, element by element, error ≤ 2 · (eager's largest error in
# units) + 4 units. In addition, whatever eager does, the root mean square of the error is at most 1e-6 of the
# magnitude, and of 16-bit results 4e-3 (bf16) and 5e-4 (fp16) of themselves, and half an ulp for each
# rounding on the way. These hold one rounding (2^-8, 2^-11); what is written for an upstream gradient of 1
# and scaled by another, in bf16 only, is rounded twice, and may be twice as far off.
CAPS = {fp32: 0.0, bf16: 4e-3, fp16: 5e-4}
LEAST = {
    fp32: 2.0**-100,
    bf16: 2.0**-100,
    fp16: 2.0**-24,
}  # smallest ulp: fp16 has subnormals; what is below 2^-100 may be flushed


class Allowed(NamedTuple):
    magnitude: Tensor
    coarse: Tensor | float = 0.0


def ulp(x: Tensor, dtype) -> Tensor:
    if dtype not in LEAST:
        return torch.zeros_like(x)
    eps = torch.finfo(dtype).eps
    exponent = torch.frexp(x.abs().clamp(LEAST[dtype] / eps, torch.finfo(dtype).max)).exponent - 1
    return torch.ldexp(torch.full_like(x, eps), exponent)


def allowed_likelihood(residual, doubt, raw_scale, eps, lost=0.0):
    """Of the loss and raw_scale. Errors of the residual are relative to `doubt`; `lost` are its 16-bit
    ulps."""
    variance, size, r = F.softplus(raw_scale) + eps, residual[0].numel() * len(residual), residual.abs()
    v = variance[:, None, None]
    square, lost_square = (r + 2 * doubt) * r, 2 * r * lost
    half = torch.sigmoid(raw_scale) / (2 * len(variance))
    squares, lost_squares = (
        x.mean((0, 2, 3)) / variance**2 for x in (square, lost_square * torch.ones_like(r))
    )
    return 1 / (v * size), {
        "loss": Allowed(
            0.5 * ((square / v).mean() + (variance.log().abs() + 1).mean()), 0.5 * (lost_square / v).mean()
        ),
        "raw_scale": Allowed(half * (1 / variance + 2 * squares), half * lost_squares),
    }


def allowed_vid_nll(mean, target, raw_scale, eps=1e-5, number=1.0):
    slope, allowed = allowed_likelihood(mean - target, torch.zeros_like(mean), raw_scale, eps)
    return {
        **allowed,
        "mean": Allowed((mean - target).abs() * slope),
        "target": Allowed((mean - target).abs() * slope),
    }


def allowed_mean_squared_error(prediction, target, number=1.0):
    slope = 2 * (prediction - target).abs() / prediction.numel()
    return {
        "loss": Allowed((prediction - target).square().mean()),
        "prediction": Allowed(slope),
        "target": Allowed(slope),
    }


def allowed_projected_vid_nll(
    hidden, weight, bias, target, raw_scale, eps=1e-5, number=1.0, factor=1.0, dtype=fp32, fused=False
):
    """In the kernel d = ∂loss/∂mean is rounded once to the dtype of hidden, in bf16 before it is multiplied
    by upstream, in fp16 after. As a convolution the mean, the bias and all its gradients are in that dtype,
    and d is rounded twice: before and after upstream."""
    bias = torch.zeros_like(raw_scale) if bias is None else bias
    mean = F.conv2d(hidden, weight, bias)
    doubt = F.conv2d(hidden.abs(), weight.abs(), bias.abs()) + target.abs()
    lost = 0.0 if fused else ulp(mean, dtype) + ulp(bias, dtype)[:, None, None]
    slope, allowed = allowed_likelihood(mean - target, doubt, raw_scale, eps, lost)
    d, magnitude = (mean - target) * slope, doubt * slope
    before, after = (ulp(d * times, dtype) / times for times in (factor, number))
    rounded = (before if dtype == bf16 else after) if fused else before + after + slope * lost

    def through(multiply):  # a convolution backward, of magnitudes
        exact = multiply(d.abs())
        return Allowed(
            multiply(magnitude), multiply(rounded) + (0 if fused else ulp(exact * number, dtype) / number)
        )

    nothing = torch.zeros_like(rounded)
    return {
        **allowed,
        "target": Allowed(magnitude, rounded),
        "hidden": through(lambda t: torch.einsum("ck,bchw->bkhw", weight[:, :, 0, 0].abs(), t)),
        "weight": through(lambda t: torch.einsum("bkhw,bchw->ck", hidden.abs(), t)[:, :, None, None]),
        "bias": Allowed(magnitude.sum((0, 2, 3)), nothing.sum((0, 2, 3)))
        if fused
        else through(lambda t: t.sum((0, 2, 3))),
    }


def allowed_attention_transfer(student, teacher, number=1.0):
    maps = {"student": student, "teacher": teacher}
    a = {name: x.square().mean(1, keepdim=True) for name, x in maps.items()}
    norm = {name: x.norm(dim=(2, 3), keepdim=True).clamp_min(1e-12) for name, x in a.items()}
    q, p = (a[name] / norm[name] for name in maps)
    both, product, size = q + p, (q * p).sum((1, 2, 3), keepdim=True), q.numel()
    # D is off by 2^-24 of Q + Q', so D² by that times 2|D|, and where D is 0 by its square; 8 roundings each
    allowed = {"loss": Allowed((both * (2 * (q - p).abs() + 2**-21 * both)).sum() / size)}
    for name, own in (("student", q), ("teacher", p)):
        x = maps[name]
        allowed[name] = Allowed(4 / (size * x.shape[1]) * (both + own * (1 + product)) / norm[name] * x.abs())
    return allowed


def allowed_softened_kl(student_logits, teacher_logits, temperature=4.0, number=1.0):
    s, t = (F.log_softmax(x / temperature, 1) for x in (student_logits, teacher_logits))
    ps, pt, slope = s.exp(), t.exp(), temperature / len(s)
    # log p is off by 2^-24 of itself and of 1, p by that relative to itself
    terms = pt * ((1 + t.abs()) * (t - s).abs() + t.abs() + s.abs() + 1)
    return {
        "loss": Allowed(temperature * slope * terms.sum()),
        "student_logits": Allowed(slope * (ps * (1 + s.abs()) + pt * (1 + t.abs()))),
        "teacher_logits": Allowed(slope * (terms + pt * (2 + t.abs()) * terms.sum(1, keepdim=True))),
    }


def check(op, inputs, *, wanted=None, layout="dense", upstream="1", factor=1.0, **options):
    """Evaluates `op` in Triton, and asserts of each result that it is exact enough."""
    wanted, options = (
        learners(inputs) if wanted is None else wanted,
        {"upstream": upstream, "factor": factor, **options},
    )
    got = evaluate(op, inputs, wanted=wanted, layout=layout, **options)
    eager = evaluate(op, inputs, wanted=wanted, impl="reference", **options)
    exact_inputs = {name: x if x is None else x.double() for name, x in inputs.items()}
    special = {name: value for name, value in options.items() if name in ("eps", "temperature")}
    number = UPSTREAM[upstream][0] * factor
    if op == "projected_vid_nll":
        dtype = inputs["hidden"].dtype
        exact_inputs["weight"] = inputs["weight"].to(dtype).double()  # multiplied in that dtype by definition
        special |= {"factor": factor, "dtype": dtype, "fused": runs_in_kernel(inputs, wanted)}
    exact = evaluate(op, exact_inputs, wanted=wanted, impl="reference", **options)
    allowed = globals()[f"allowed_{op}"](**exact_inputs, **special, number=number)
    for name, x in got.items():
        value = inputs.get(name)
        assert x.dtype == (fp32 if value is None else value.dtype) and x.shape == exact[name].shape, name
        most, times = torch.finfo(x.dtype).max, factor if value is None else number
        assert not x.isnan().any(), f"{name} of {op} is NaN"
        x, e, r = (
            t.double().clamp(-most, most) for t in (x, eager[name], exact[name])
        )  # beyond the largest number it is infinity
        magnitude, coarse = (times * torch.as_tensor(t, device=r.device) for t in allowed[name])
        own = ulp(r, got[name].dtype) if got[name].dtype != fp32 else torch.zeros_like(r)
        unit = ulp(magnitude, fp32) + (own + coarse) / 4
        error, eager_error = (x - r).abs() / unit, ((e - r).abs() / unit).max()
        assert error.max() <= 2 * eager_error + 4, (
            f"{name} of {op} is off by {error.max():.1f} units, eager by {eager_error:.1f}"
        )
        roundings = 1 + (got[name].dtype == bf16 and upstream == "stride-0")
        rms = (
            roundings * CAPS[got[name].dtype] * r.norm()
            + 1e-6 * magnitude.norm()
            + (coarse / 2 * torch.ones_like(r)).norm()
        )
        assert (x - r).norm() <= rms + LEAST[got[name].dtype] * r.numel() ** 0.5, (
            f"{name} of {op}: root mean square of the error"
        )


def runs_in_kernel(inputs, wanted):
    return projected_vid._fits(
        inputs["hidden"], inputs["weight"], inputs["target"].clone().requires_grad_("target" in wanted)
    )


@contextmanager
def memory_starts_as_nan():
    """New floating-point memory of the kernels' own is NaN, so that an element that is never written
    shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
        yield


@contextmanager
def cut(module, constants):
    """Small maps in several programs, tiles and rounds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(module, name, value)
        yield


# --- drawn inputs

TIMES = st.floats(-3, 4).map(lambda exponent: 10**exponent)
RAW = st.tuples(st.floats(-10, 10), st.floats(-10, 10)).map(sorted)
EPS = st.sampled_from([1e-5, 1e-8, 1e-2])
SMALL = {  # constants that cut small maps into several programs, tiles and rounds
    "vid_nll": (vid, {"_TILE": 1024, "_PROGRAMS": 2}),
    "mean_squared_error": (vid, {"_TILE": 1024, "_PROGRAMS": 2}),
    "projected_vid_nll": (vid, {"_BLOCK_WEIGHTS": 1024}),
    "attention_transfer": (attention, {"_IN_REGISTERS": 0, "_POSITIONS": 16, "_TILE": 512}),
    "softened_kl": (kd, {"_TILE": 128}),
}


@each_op
@settings(
    max_examples=300 if DEVICE == "cpu" else 100,  # on a GPU nearly every example is compiled
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_loss_of_drawn_inputs_is_exact_enough(op, data):
    draws = data.draw
    batch, width, height = draws(st.integers(1, 3)), draws(st.integers(1, 70)), draws(st.integers(1, 9))
    shape = (height, width) if op == "softened_kl" else (batch, width, height, draws(st.integers(1, 3)))
    dtype, other = draws(st.sampled_from([fp32, bf16, fp16])), draws(st.sampled_from([fp32, bf16, fp16]))
    use = {"layout": draws(st.sampled_from([*LAYOUTS])), "upstream": draws(st.sampled_from([*UPSTREAM]))}
    use["factor"] = draws(st.sampled_from([1.0, 0.3, 100.0]))
    sizes = {"times": draws(TIMES), "teacher_times": draws(TIMES), "seed": draws(st.integers(0, 2**31))}
    if op == "projected_vid_nll":
        sizes |= {
            "channels": draws(st.sampled_from([width, 2 * width, height])),
            "bias": draws(st.booleans()),
        }
    else:
        sizes["near"] = draws(st.sampled_from([None, None, 2**-8, 0.0]))
    if op == "attention_transfer":
        sizes["channels"] = draws(st.none() | st.integers(1, 70))
    if op == "softened_kl":
        use["temperature"] = draws(st.floats(0.5, 20))
    if op.endswith("vid_nll"):
        sizes["raw"], use["eps"] = draws(RAW), draws(EPS)
    inputs = inputs_of(op, shape, dtype=dtype, other=other, **sizes)
    wanted = [*list(inputs)[:2][draws(st.sampled_from([slice(1), slice(2), slice(1, 2)]))], *list(inputs)[2:]]
    if op == "projected_vid_nll":
        wanted = learners(inputs) + ["target"] * draws(st.sampled_from([False, False, True]))
        use["factor"] *= room(inputs, **{name: use[name] for name in ("eps", "factor", "upstream")})
    module, constants = SMALL[op]
    one_program = {key: value | {"programs": 1} for key, value in projected_vid._CUTS.items()}
    with memory_starts_as_nan(), ExitStack() as stack:
        if op == "projected_vid_nll" or draws(st.integers(0, 3)) == 0:
            stack.enter_context(cut(module, constants))
        if op == "projected_vid_nll" and draws(st.booleans()):
            stack.enter_context(cut(projected_vid, {"_CUTS": one_program}))
        check(op, inputs, wanted=wanted, **use)


def test_a_projection_whose_gradient_lies_on_either_side_of_a_power_of_two_is_exact_enough():
    inputs = inputs_of(
        "projected_vid_nll", (1, 1, 1, 1), dtype=bf16, other=fp32, channels=1, bias=False, raw=(0.0, 3.0)
    )
    check("projected_vid_nll", inputs, layout="cat", upstream="stride-0")


def room(inputs, **options):
    """A power of two that keeps all 16-bit gradients below 16384, also of the mean: inf proves nothing."""
    exact = {name: x if x is None else x.double() for name, x in inputs.items()}
    wanted = [name for name in exact if exact[name] is not None and name != "raw_scale"]
    gradients = evaluate("projected_vid_nll", exact, impl="reference", wanted=wanted, **options)
    largest = max(gradients[name].abs().max() for name in wanted)
    return 2.0 ** -max(0, math.ceil(math.log2(largest / 16384 + 1e-30)))


# --- chosen inputs

STEM, ODD, ONE = (4, 16, 32, 32), (3, 24, 5, 7), (1, 1, 1, 1)
WIDE, TALL, PROGRAMS = (2, 300, 3, 3), (1, 3, 64, 33), (5, 70, 9, 9)  # more channels or rows than a tile
BEYOND_REGISTERS, TWO_TILES = (1, 64, 32, 32), (2, 20, 40, 40)  # of attention transfer
CASES = [
    *[("vid_nll", shape) for shape in (STEM, ODD, ONE, WIDE, TALL, PROGRAMS)],
    *[("mean_squared_error", shape) for shape in (ODD, WIDE, PROGRAMS)],
    *[("attention_transfer", shape) for shape in (STEM, ODD, ONE, WIDE, BEYOND_REGISTERS, TWO_TILES)],
    *[("softened_kl", shape) for shape in ((128, 10), (5, 100), (2, 1000), (300, 10), (1, 1))],
]


@each_dtype
@pytest.mark.parametrize("op, shape", CASES, ids=str)
def test_loss_and_gradients_match_float64(op, shape, dtype):
    options = {"channels": shape[1] + 2} if op == "attention_transfer" else {}
    times = 3.0 if op == "softened_kl" else 1.0
    check(op, inputs_of(op, shape, dtype=dtype, times=times, **options), upstream="stride-0")


WIDTHS = [(16, 32), (32, 32), (64, 64), (64, 128), (128, 128), (128, 256), (24, 48), (3, 5)]


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bias, weight_dtype", [(True, fp32), (False, None)], ids=["bias", "no-bias"])
@pytest.mark.parametrize("channels, hidden", [*WIDTHS, (16, 40)])
def test_projection_matches_float64(channels, hidden, bias, weight_dtype, dtype):
    inputs = inputs_of("projected_vid_nll", (3, channels, 9, 9), dtype=dtype, channels=hidden, bias=bias)
    inputs["weight"] = inputs["weight"].to(weight_dtype or dtype)
    with cut(vid, {"_BLOCK_WEIGHTS": max(64, channels * hidden // 128)}):  # 128 programs at most
        assert_in_kernel((channels, hidden) in WIDTHS, inputs, learners(inputs))


@pytest.mark.parametrize("dtype, with_target", [(fp32, False), (fp32, True), (bf16, True), (fp16, True)])
def test_projection_in_fp32_or_with_a_learned_target_is_a_convolution(dtype, with_target):
    inputs = inputs_of("projected_vid_nll", (3, 16, 5, 7), dtype=dtype)
    assert_in_kernel(False, inputs, learners(inputs) + ["target"] * with_target)


def assert_in_kernel(expected, inputs, wanted):
    calls, original = [], projected_vid._projected_vid_nll
    with cut(projected_vid, {"_projected_vid_nll": lambda *args: calls.append(1) or original(*args)}):
        check("projected_vid_nll", inputs, wanted=wanted, upstream="stride-0")
    assert bool(calls) == expected


# --- memory, bits, and what backward is asked for


def small(op, dtype=bf16, batch=3, height=5, **options):
    return inputs_of(
        op, (batch * height, 10) if op == "softened_kl" else (batch, 10, height, 7), dtype=dtype, **options
    )


def learning(inputs):
    return {name: x.clone().requires_grad_(name in learners(inputs)) for name, x in inputs.items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert x.dtype == second[name].dtype and torch.equal(x, second[name]), name


@each_op
@each_dtype
def test_equal_inputs_give_equal_bits_also_when_memory_starts_as_nan(op, dtype):
    inputs = small(op, dtype)
    for upstream in UPSTREAM:
        first = evaluate(op, inputs, upstream=upstream)
        with memory_starts_as_nan():
            assert torch.empty(3).isnan().all() and torch.empty_like(inputs[[*inputs][0]]).isnan().all()
            assert_same_bits(first, evaluate(op, inputs, upstream=upstream))


@each_op
@each_dtype
def test_a_gradient_matches_float64_when_it_is_the_only_one(op, dtype):
    inputs = small(op, dtype)
    for name in learners(inputs):
        check(op, inputs, wanted=[name], upstream="stride-0")


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@each_op
def test_without_gradients_the_loss_has_the_same_bits_and_no_graph(op, off):
    inputs = small(op)
    with off():
        loss = getattr(kernels, op)(**inputs, impl="triton")
        assert torch.equal(loss, getattr(kernels, op)(**learning(inputs), impl="triton"))
    assert not loss.requires_grad and torch.equal(loss, evaluate(op, inputs)["loss"])


@each_op
@each_dtype
def test_a_second_backward_adds_the_same_gradient_and_leaves_the_first_alone(op, dtype):
    leaves = learning(small(op, dtype))
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    loss = getattr(kernels, op)(**leaves, impl="triton")
    first = torch.autograd.grad(loss, wanted, retain_graph=True)  # hands on what forward wrote
    copies = [gradient.clone() for gradient in first]
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, gradient, copy in zip(wanted, first, copies):
        assert torch.equal(gradient, copy) and torch.equal(leaf.grad, 2 * copy)


@each_op
@each_dtype
def test_gradients_of_the_inputs_can_be_taken_one_after_the_other(op, dtype):
    leaves = learning(small(op, dtype))
    expected, loss = evaluate(op, small(op, dtype)), getattr(kernels, op)(**leaves, impl="triton")
    for name in reversed(learners(leaves)):
        assert torch.equal(torch.autograd.grad(loss, leaves[name], retain_graph=True)[0], expected[name]), (
            name
        )


@each_op
def test_gradients_that_vanish_in_fp16_survive_when_the_loss_is_scaled_by_65536(op):
    inputs, factor = small(op, fp16), {"attention_transfer": 1e-5, "softened_kl": 1e-7}.get(op, 3e-7)
    first = [*inputs][0]
    assert not evaluate(op, inputs, factor=factor, impl="reference")[first].any()
    assert (
        evaluate(op, inputs, factor=factor, upstream="65536")[first].count_nonzero()
        > 0.8 * inputs[first].numel()
    )
    check(op, inputs, factor=factor, upstream="65536")


# --- NaN, inf and empty tensors


def assert_as_reference(op, inputs):
    got, expected = (evaluate(op, inputs, impl=impl) for impl in ("triton", "reference"))
    for name, x in got.items():
        assert x.shape == expected[name].shape and x.dtype == expected[name].dtype
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(x), kind(expected[name])), f"{kind.__name__} of {name}"


@each_op
@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_appear_where_the_reference_has_them(op, dtype, value):
    for name, x in small(op, dtype).items():
        inputs = small(op, dtype)
        inputs[name][(x.shape[0] // 2, *(size // 2 for size in x.shape[1:]))] = value
        assert_as_reference(op, inputs)


@each_dtype
@pytest.mark.parametrize(
    "op, empty", [*((op, "batch") for op in OPS), *((op, "height") for op in OPS if op not in CONVOLVED)]
)
def test_a_loss_of_empty_maps_is_nan_with_the_gradients_of_the_reference(op, empty, dtype):
    inputs = small(op, dtype, **{empty: 0})
    assert evaluate(op, inputs)["loss"].isnan()
    assert_as_reference(op, inputs)


# --- maps of more than 2^31 elements


def run_last(kernel, programs, *args, **constants):
    """Runs the last program alone, so that of memory that was only reserved it touches but its own part;
    integers are checked."""
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", interpreter.InterpreterOptions())
        patch.setattr(
            builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (programs - 1, y, z))
        )
        kernel[(1,)](*args, **constants)


def reserve(*shape, count=1, dtype=fp16):
    """Memory that is reserved but not touched, so that it costs nothing."""
    tensors = [torch.empty(*shape, dtype=dtype) for _ in range(count)]
    return tensors if count > 1 else tensors[0]


@only_interpreted
def test_the_last_program_of_the_residual_kernel_reads_and_writes_beyond_2_to_the_31():
    rows, channels = 2**24 + 40, 128
    mean, target, gradient = reserve(rows, channels, count=3)
    mean[-8:], target[-8:] = 2, 5
    programs = -(-rows // 32)
    partial = torch.empty(programs, channels)
    tensors, constants = (
        (mean, target, None, None, partial, gradient),
        {"CHANNELS": channels, "BLOCK_ROWS": 32},
    )
    run_last(vid._residual_kernel, programs, *tensors, rows, 1, 0.0, 0.25, BLOCK_CHANNELS=128, **constants)
    assert (gradient[-8:] == -1.5).all() and (partial[-1] == 8 * 9).all()  # -3 · ¼ / ½


@only_interpreted
def test_the_last_program_of_the_projection_reads_and_writes_beyond_2_to_the_31():
    rows, channels = 2**27 + 8, 16
    hidden, target, gradient = reserve(rows, channels, count=3)
    hidden[-8:], target[-8:] = 1, torch.arange(16)
    programs = -(-rows // 64)
    square, residual = torch.empty(2, programs, 16)
    weight_partial = torch.empty(programs, 16, 16)
    inputs = (hidden, torch.eye(16), None, target, torch.full((16,), -200.0), None)
    outputs, sizes = (square, residual, gradient, weight_partial), ("CHANNELS", "HIDDEN", "SLICE")
    constants = dict.fromkeys((*sizes, "BLOCK_CHANNELS", "BLOCK_HIDDEN"), 16) | {"BLOCK_ROWS": 64}
    run_last(projected_vid._projection_kernel, programs, *inputs, *outputs, rows, 1, 0.5, 0.25, **constants)
    expected = 1 - torch.arange(16.0)
    assert (residual[-1] == 8 * expected).all() and (square[-1] == 8 * expected**2).all()
    assert (gradient[-8:] == expected / 2).all() and (weight_partial[-1] == 4 * expected[:, None]).all()


@pytest.mark.parametrize("channels", [1, 100, 128, 4096, 65536, 2**20])
def test_no_program_of_the_residual_kernel_walks_beyond_2_to_the_31_elements(channels):
    rows = 2**37 // channels
    programs, _, tiles, constants = vid._cut(rows, channels)
    rows_each = tiles * constants["BLOCK_ROWS"]
    assert rows_each * channels <= 2**31 and programs * rows_each >= rows


@only_interpreted
@pytest.mark.parametrize("kernel", ["_attention_kernel", "_tiled_attention_kernel"])
def test_the_last_image_of_attention_transfer_is_read_and_written_beyond_2_to_the_31(kernel):
    images, positions, channels = 2**25 + 1, 4, 16
    student, teacher, gradient = reserve(images, positions, channels, count=3)
    student[-1], teacher[-1], loss = 1, torch.tensor([1.0, 0, 0, 0])[:, None], torch.empty(images)
    sizes = ("STUDENT_CHANNELS", "TEACHER_CHANNELS", "STUDENT_BLOCK", "TEACHER_BLOCK")
    constants = dict.fromkeys(sizes, 16) | {"BLOCK_POSITIONS": 4}
    tensors = (student, teacher, None, loss, gradient)
    run_last(getattr(attention, kernel), images, *tensors, positions, 1.0, **constants)
    assert loss[-1] == 1  # Q = (½, ½, ½, ½) and (1, 0, 0, 0); D - Q·⟨D, Q⟩ = (-½ - ¼·½·..., ...)
    assert (gradient[-1, 0] == -0.0625 * 1.5).all()


@only_interpreted
def test_the_last_program_of_rescale_reads_and_writes_beyond_2_to_the_31():
    gradient, nothing, upstream = reserve(2**31 + 32), torch.empty(0), torch.tensor(3.0)
    gradient[-32:] = 2
    tensors, programs = (gradient, nothing, nothing, upstream), -(-len(gradient) // 2048)
    run_last(one_pass._rescale_kernel, programs, *tensors, len(gradient) // 16, 0, BLOCK=2048, UNIT=16)
    assert (gradient[-32:] == 6).all()


def test_rows_of_logits_may_lie_more_than_2_to_the_31_apart():
    dense = draw(3, 10, dtype=fp16)
    memory = torch.empty(2**31 + 32, dtype=fp16, device=DEVICE)  # of which three rows are touched
    apart = memory.as_strided((3, 10), (2**30 + 8, 1))
    apart.copy_(dense)
    inputs = {"student_logits": apart.requires_grad_(), "teacher_logits": apart.detach().flip(0)}
    loss = kernels.softened_kl(**inputs, impl="triton")
    expected = evaluate(
        "softened_kl", {"student_logits": dense, "teacher_logits": dense.flip(0)}, wanted=["student_logits"]
    )
    assert_same_bits(expected, {"loss": loss.detach(), "student_logits": torch.autograd.grad(loss, apart)[0]})


@pytest.mark.gpu
def test_vid_nll_of_more_than_2_to_the_31_elements():
    if DEVICE != "cuda" or torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("no GPU with 20 GiB here")
    shape = (2**15 + 1, 64, 32, 32)  # 4.3 GB in bf16; both maps and a gradient
    mean, target = (
        torch.zeros(shape, dtype=bf16, device=DEVICE).contiguous(memory_format=CL) for _ in range(2)
    )
    mean[-1] = 3
    raw_scale = torch.full((64,), -200.0, device=DEVICE)  # the variance is eps
    loss = kernels.vid_nll(
        mean.requires_grad_(), target, raw_scale, eps=0.5, factor=2.0**15 + 1, impl="triton"
    )
    (gradient,) = torch.autograd.grad(loss, mean)
    assert loss.item() == pytest.approx(9 + (2**15 + 1) * math.log(0.5) / 2, rel=1e-6)
    assert not gradient[:-1].any() and (gradient[-1] == 3 / 0.5 / 2**16).all()
