"""One step: what each student learns from it, in each precision and engine."""

import copy
import math
import re
import warnings

import numpy as np
import pytest
import torch

from fastvid import step as step_module
from fastvid.config import FitNetOptions, TrainConfig, VIDOptions
from fastvid.datasets import Arrays
from fastvid.device import DTYPES
from fastvid.errors import InputError
from fastvid.loader import EvalLoader, dali_is_installed, train_loader
from fastvid.methods import Terms, build
from fastvid.plan import BatchPlan
from fastvid.step import LONG, GroupStep, Mode, choose_engine, evaluate
from fastvid.student import Student, new_student
from fastvid.wresnet import WideResNet

CPU = torch.device("cpu")


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return "cuda"


def random_arrays(count):
    generator = np.random.default_rng(0)
    return Arrays(
        generator.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8),
        generator.integers(0, 10, count),
        tuple("0123456789"),
        (0.5, 0.5, 0.5),
        (0.25, 0.25, 0.25),
    )


def student(method="student", teacher=None, **settings):
    config = TrainConfig(method=(method,), student_depth=10, **settings).resolved()
    return new_student(method, config, 10, teacher, CPU)


def batch(count=4):
    torch.manual_seed(1)
    return torch.randn(count, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (count,))


def first_step(teacher, one, precision, learning_rate):
    """One step, repeated while fp16 skips the step: the first loss scale is too high for low variances."""
    step, scale = GroupStep(teacher, [one], CPU, precision), None
    while scale != one.scaler.get_scale():
        scale = one.scaler.get_scale()
        step(*batch(), learning_rate)


def flat(parameters):
    return torch.cat([parameter.detach().flatten().double() for parameter in parameters])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clip_norm_bounds_the_update_of_student_and_regressors_together(precision):
    settings = {"learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0, "precision": precision}
    teacher = WideResNet(10, 2)
    norms = {}
    for limit in (0.0, 0.01):
        one = student("vid", teacher, clip_norm=limit, **settings)
        before = flat(one.parameters)
        first_step(teacher.eval(), one, precision, 1.0)
        norms[limit] = float((flat(one.parameters) - before).norm())
    assert norms[0.0] > 0.1
    # clip_grad_norm_ adds 1e-6 to the norm, and fp32 weights round the update
    assert norms[0.01] == pytest.approx(0.01, rel=1e-2)


def test_a_norm_below_the_limit_is_left_alone():
    updated = []
    for limit in (0.0, 1e6):
        one = student(clip_norm=limit, precision="fp32")
        GroupStep(None, [one], CPU, "fp32")(*batch(), 0.1)
        updated.append(flat(one.parameters))
    assert torch.equal(*updated)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_moves_every_parameter_but_those_of_the_teacher(precision):
    teacher = WideResNet(10, 2).eval()
    one, taught = student("vid", teacher, precision=precision), flat(teacher.parameters())
    before = [parameter.detach().clone() for parameter in one.parameters]
    first_step(teacher, one, precision, 0.1)
    moved = [not torch.equal(now, old) for now, old in zip(one.parameters, before)]
    assert all(moved) and all(parameter.isfinite().all() for parameter in one.parameters)
    assert torch.equal(flat(teacher.parameters()), taught) and all(
        parameter.grad is None for parameter in teacher.parameters()
    )
    assert all(parameter.dtype == torch.float32 for parameter in one.parameters)


@pytest.mark.parametrize("variant, exempt", [("paper", 4), ("repdistiller", 0)])
def test_without_gradients_only_decay_moves_weights_and_it_spares_the_variances_of_the_paper_variant(
    variant, exempt
):
    one = student(
        "vid",
        WideResNet(10, 2),
        vid=VIDOptions(variant=variant),
        learning_rate=0.5,
        weight_decay=0.1,
        momentum=0.0,
    )
    with torch.no_grad():
        for parameter in one.parameters:
            parameter.fill_(2.0)
    nothing = sum((parameter * 0).sum() for parameter in one.parameters)
    one.update(Terms(nothing, nothing.detach()), images=1)
    values = [
        (name, parameter)
        for module in (one.network, one.method)
        for name, parameter in module.named_parameters()
    ]
    unmoved = [name for name, parameter in values if torch.equal(parameter, torch.full_like(parameter, 2.0))]
    assert len(unmoved) == exempt and all("raw_scales" in name for name in unmoved)
    for name, parameter in values:
        if name not in unmoved:
            torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 2.0 * (1 - 0.5 * 0.1)))


def update(one, task, transfer=0.0, images=4, slope=1.0):
    """One update whose losses are these, and whose gradients are `slope`."""
    output = one.network(batch()[0]).logits.sum()
    output.register_hook(lambda gradient: gradient * slope)
    one.update(Terms(task + output - output.detach(), torch.tensor(transfer)), images)


def test_losses_are_means_over_the_images_of_all_updates():
    one = student(learning_rate=0.0)
    update(one, 1.0, 10.0, images=3)
    update(one, 5.0, 2.0, images=1)  # a last short batch weighs less
    assert one.losses(4) == one.losses(4) == (2.0, 8.0)


@pytest.mark.survival("numbers")
@pytest.mark.parametrize("clip_norm", [0.0, 1.0], ids=["", "clipped"])
@pytest.mark.parametrize(
    "losses, slope, reason",
    [
        pytest.param((math.nan, 0.0), 1.0, "task loss nan", id="nan-task"),
        pytest.param((1.0, math.inf), 1.0, "transfer loss inf", id="infinite-transfer"),
        pytest.param((1.0, 0.0), math.nan, "a loss or gradient was NaN or inf", id="nan-gradient"),
        pytest.param((1.0, 0.0), math.inf, "a loss or gradient was NaN or inf", id="infinite-gradient"),
    ],
)
def test_from_the_first_step_with_nan_or_inf_on_a_student_is_frozen_and_counts(
    losses, slope, reason, clip_norm
):
    one = student(clip_norm=clip_norm)
    update(one, 1.0)
    assert one.failed_steps() == 0 and one.divergence() is None
    before = [tensor.clone() for tensor in (*one.parameters, *momenta_of(one))]
    update(one, *losses, slope=slope)
    assert one.failed_steps() == 1
    update(one, 1.0)
    assert one.failed_steps() == 2 and one.divergence() == reason
    assert all(map(torch.equal, before, (*one.parameters, *momenta_of(one))))


@pytest.mark.survival("numbers")
def test_losses_whose_sum_overflows_count_as_divergence():
    one = student(learning_rate=0.0)
    update(one, 1.0, 1e38, images=16)
    assert one.failed_steps() == 0 and one.divergence() == "transfer loss inf"


def momenta_of(one):
    return [state["momentum_buffer"] for state in one.optimizer.state.values()]


@pytest.mark.parametrize("method", ["student", "vid"])
def test_a_student_with_the_state_of_another_resumes_with_the_same_bits(method):
    teacher = WideResNet(10, 2).eval()
    first, second = student(method, teacher, precision="fp16"), student(method, teacher, precision="fp16")
    step = GroupStep(teacher, [first], CPU, "fp16")
    step(*batch(), 0.1)
    second.load_state(copy.deepcopy(first.state()))  # a copy, because state() shares the momentum
    step(*batch(), 0.02)
    GroupStep(teacher, [second], CPU, "fp16")(*batch(), 0.02)
    assert torch.equal(flat(first.parameters), flat(second.parameters)) and first.losses(8) == second.losses(
        8
    )


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_is_a_count_over_all_images_in_eval_mode_and_the_mode_is_restored(training):
    torch.manual_seed(0)
    network, arrays = WideResNet(10, 1).train(), random_arrays(50)
    network(torch.randn(8, 3, 32, 32))  # running statistics that differ from those of a batch
    network.train(training)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    accuracy = evaluate(network, EvalLoader(arrays, 20), CPU, "fp32")  # 20 + 20 + 10
    assert network.training == training and all(
        torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers()
    )

    images = torch.from_numpy(arrays.images).permute(0, 3, 1, 2).double() / 255
    logits = network.double().eval()((images - 0.5) / 0.25).logits
    hits = sum(int(row.argmax()) == label for row, label in zip(logits, arrays.labels))
    assert 0 < hits < 50, "chance hits some"
    assert accuracy == 100 * hits / 50


METHODS = ("student", "kd", "fitnet", "at", "vid")


def trained(
    engine, precision, device, methods=METHODS, sizes=(16, 16, 8, 16, 8), dtype=torch.float32, **settings
):
    """Change of the weights of each student and its regressors after batches of these sizes; the GroupStep.

    dtype: of weights, and of images.
    """
    torch.manual_seed(0)
    teacher = WideResNet(10, 2)
    teacher(torch.randn(16, 3, 32, 32))  # running statistics
    teacher.eval().requires_grad_(False).to(device, dtype)
    students = []
    for name in methods:
        torch.manual_seed(1)
        network, config = WideResNet(10, 1), TrainConfig(method=(name,), precision=precision, **settings)
        method = build(name, config, network, teacher).to(dtype)
        students.append(Student(name, network.to(dtype), method, config, torch.device(device)))
    before = [flat(one.parameters) for one in students]
    step = GroupStep(teacher, students, torch.device(device), precision, engine)
    generator = torch.Generator().manual_seed(2)
    for number, size in enumerate(sizes):
        step.begin_epoch(number / len(sizes))
        images = torch.randn(size, 3, 32, 32, generator=generator).to(
            device, dtype, memory_format=torch.channels_last
        )
        step(images, torch.randint(10, (size,), generator=generator).to(device), 0.01 / (1 + number))
    return [flat(one.parameters).cpu() - start.cpu() for one, start in zip(students, before)], step


@pytest.fixture
def exact(monkeypatch):
    """As trained, in float64; only cross entropy is in fp32."""

    def train(device, engine="eager", **settings):
        with monkeypatch.context() as patch:
            patch.setitem(DTYPES, "fp32", torch.float64)
            return trained(engine, "fp32", device, dtype=torch.float64, **settings)

    return train


def close_enough(moves, eager, exact):
    """Whether a training is as close to float64 as the eager training, up to a factor, over all students.

    Fused code rounds at other places, but not worse. Its rounding errors are another random draw, and an
    error that flips the sign of an input of a ReLU has a large effect: hence all students together, and a
    factor of 3. A wrong gradient makes a distance of the order of 1.
    """
    moved, other, true = map(torch.cat, (moves, eager, exact))
    return (moved - true).norm() <= 3 * (other - true).norm() < 0.5 * true.norm()


@pytest.mark.slow
def test_a_compiled_step_trains_as_the_eager_one_and_its_compilation_leaves_no_trace(exact):
    settings = {"methods": ("vid",), "sizes": (8, 4, 8)}
    (eager,), _ = exact("cpu", **settings)
    (compiled,), step = exact("cpu", "compile", **settings)
    # The differences are fp32 in the cross entropy, 2^-24, and five sums over the images, with a margin of
    # ten. No ReLU flips.
    assert (compiled - eager).norm() < 1e-5 * eager.norm()
    assert step.clock.seconds["preparation"] > 0
    losses = step.students[0].losses(20)
    before, spent = step.students[0].state(), step.clock.seconds["preparation"]
    (again,), other = exact("cpu", "compile", **settings)  # a second group is not compiled anew
    assert torch.equal(compiled, again) and other.students[0].losses(20) == losses
    assert (
        other.clock.seconds["preparation"] < spent / 2 and before.keys() == other.students[0].state().keys()
    )


@pytest.mark.slow
def test_a_compilation_that_fails_ends_in_one_line_with_the_remedy():
    torch._dynamo.reset()
    broken = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with (
        broken,
        pytest.raises(InputError, match=r"torch.compile failed \(.+\): take --engine eager") as caught,
    ):
        trained("compile", "fp32", "cpu", methods=("student",), sizes=(3,))
    assert "\n" not in str(caught.value)


def test_a_rehearsal_leaves_no_trace_in_networks_regressors_momenta_sums_and_scaler():
    _, step = trained("eager", "fp16", "cpu", methods=("vid",), sizes=(4,))
    (one,) = step.students
    before = copy.deepcopy(one.state())
    with step.rehearsal():
        step(*batch(), 0.1)
        assert not torch.equal(one.state()["network"]["conv1.weight"], before["network"]["conv1.weight"])
    after = one.state()
    for part in ("network", "method", "momenta"):
        assert all(torch.equal(value, before[part][name]) for name, value in after[part].items())
    assert torch.equal(after["loss_sums"], before["loss_sums"]) and after["scaler"] == before["scaler"]


@pytest.mark.parametrize(
    "name, device, steps, expected",
    [
        ("auto", "cpu", LONG - 1, "eager"),
        ("auto", "cpu", LONG, "compile"),
        ("eager", "cpu", LONG, "eager"),
        ("compile", "cpu", 1, "compile"),
        ("auto", "cuda", 1, "graph"),
        ("eager", "cuda", 1, "eager"),
        ("graph", "cuda", 1, "graph"),
    ],
)
def test_auto_takes_graphs_on_a_gpu_and_compiles_long_runs_on_a_cpu(
    name, device, steps, expected, monkeypatch
):
    monkeypatch.setattr(step_module, "_compiler_works", lambda: True)
    assert choose_engine(name, torch.device(device), steps) == expected


def test_without_a_compiler_nothing_is_compiled_unasked(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert step_module._compiler_works.__wrapped__() is False
    monkeypatch.setattr(step_module, "_compiler_works", lambda: False)
    assert choose_engine("auto", CPU, LONG) == "eager"


@pytest.mark.slow
def test_a_compiler_that_does_not_compile_is_noticed_before_the_training(capsys):
    torch._dynamo.reset()
    with (
        warnings.catch_warnings(),
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
    ):
        warnings.simplefilter("ignore")  # of the caches
        assert step_module._compiler_works.__wrapped__() is False
    assert re.match(
        r"torch.compile does not work here \(.+\): the engine is eager$",
        capsys.readouterr().err.splitlines()[-1],
    )
    torch._dynamo.reset()
    assert step_module._compiler_works.__wrapped__() is True


def test_a_graph_without_a_gpu_is_refused_with_the_remedy():
    with pytest.raises(InputError, match="--engine graph captures a CUDA graph, but the device is cpu: take"):
        choose_engine("graph", CPU, 1)


def test_a_step_on_a_cpu_uses_the_learning_rate_that_it_is_given_each_time():
    one = student(momentum=0.0, weight_decay=0.0, precision="fp32")
    step = GroupStep(None, [one], CPU, "fp32")
    images = batch()
    for rate in (0.0, 0.25, 0.0):
        before = flat(one.parameters)
        step(*images, rate)
        assert torch.equal(before, flat(one.parameters)) == (rate == 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "engine",
    ["compile", "graph", Mode(compiled=False, captured=True)],
    ids=["compile", "graph", "graph-of-eager"],
)
def test_every_engine_gives_the_same_training_within_bounds_on_a_gpu(engine, precision, gpu, exact):
    eager, _ = trained("eager", precision, gpu)
    other, step = trained(engine, precision, gpu)
    assert close_enough(other, eager, exact("cpu")[0])
    if step.mode.captured:
        assert len(step._prepared) == 2, "one graph for full batches and one for short ones"


@pytest.mark.gpu
def test_a_graph_of_eager_kernels_trains_to_the_bits_of_the_eager_step(gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    eager, _ = trained("eager", "bf16", gpu)
    captured, _ = trained(Mode(compiled=False, captured=True), "bf16", gpu)
    assert all(map(torch.equal, eager, captured))


@pytest.mark.gpu
def test_the_phases_of_a_two_stage_hint_have_graphs_of_their_own(gpu, exact):
    settings = {"methods": ("fitnet",), "fitnet": FitNetOptions(schedule="two-stage", hint_share=0.4)}
    eager, _ = trained("eager", "fp32", gpu, **settings)
    captured, step = trained("graph", "fp32", gpu, **settings)
    assert close_enough(captured, eager, exact("cpu", **settings)[0])
    assert len(step._prepared) == 3  # batches of 16 in the hint phase, then of 8 and 16


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_nothing_in_the_steady_state_waits_for_the_gpu(precision, backend, gpu):
    if backend == "dali" and not dali_is_installed():
        pytest.skip("DALI is not installed")
    _, step = trained("graph", precision, gpu, sizes=(16, 8))
    arrays = random_arrays(40)
    loader = train_loader(arrays, BatchPlan(40, 16, seed=0), backend=backend, device=gpu)
    for images, labels in loader.epoch(0):
        step(images, labels, 0.01)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epoch in (1, 2, 3):
            step.begin_epoch(epoch / 4)
            for images, labels in loader.epoch(epoch):
                step(images, labels, 0.01 / epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
