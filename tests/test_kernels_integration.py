"""The Triton losses inside PyTorch: compiled, under autocast, on several processes, checkpointed, in
training.

Most tests compare a loss in an unusual setting with the same loss in the usual setting. Other files test the
values.
"""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from interpreter import DEVICE, mend
from torch import distributed, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastvid
from fastvid import kernels

pytestmark = pytest.mark.slow

FACTOR = 2.0
UPSTREAM = 3.0  # the caller multiplies the loss by this; not a power of two, so that it causes rounding
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def need_gpus(count):
    if torch.cuda.device_count() < count:
        pytest.skip("no GPU here" if count == 1 else f"fewer than {count} GPUs here")


def draw(*shape, seed=0, dtype=FP32, device=DEVICE, learns=True):
    """Random numbers that depend on shape and seed alone; maps are channels-last."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + sum(shape))).to(
        device, dtype
    )
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return drawn.to(memory_format=layout).requires_grad_(learns)


def inputs_of(*shapes):
    return lambda batch, seed=0, **given: [
        draw(*(batch if size == "B" else size for size in shape), seed=seed + i, **given)
        for i, shape in enumerate(shapes)
    ]


def projection(batch, seed=0, dtype=BF16, **given):  # in fp32 it is a convolution and vid_nll
    hidden, target = (
        draw(batch, 16, 4, 4, seed=seed + i, dtype=dtype, learns=not i, **given) for i in range(2)
    )
    weight, bias, raw_scale = inputs_of((16, 16, 1, 1), (16,), (16,))(batch, seed, **given)
    return [hidden, weight, bias, target, raw_scale]


INPUTS = {  # INPUTS[loss](batch size, seed, **how to draw)
    "vid_nll": inputs_of(("B", 3, 4, 4), ("B", 3, 4, 4), (3,)),
    "mean_squared_error": inputs_of(("B", 3, 4, 4), ("B", 3, 4, 4)),
    "projected_vid_nll": projection,
    "attention_transfer": inputs_of(("B", 3, 4, 4), ("B", 5, 4, 4)),
    "softened_kl": inputs_of(("B", 10), ("B", 10)),
}
every_loss = pytest.mark.parametrize("name", INPUTS)


def loss_of(name, impl="triton"):
    return lambda *inputs: getattr(kernels, name)(*inputs, factor=FACTOR, impl=impl)


def results(function, inputs, learning=None):
    """The loss times UPSTREAM, and the gradients of all tensors that learn."""
    loss = function(*inputs) * UPSTREAM
    return [
        loss.detach(),
        *torch.autograd.grad(loss, learning or [tensor for tensor in inputs if tensor.requires_grad]),
    ]


def same_bits(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours, theirs)
    )


# --- custom ops


def samples():
    vid, _, projected, at, kd = (make(2) for make in INPUTS.values())
    upstream = torch.tensor(UPSTREAM, device=DEVICE)
    passes = [(True, None), (False, None), (True, upstream)]
    bare = [*projected[:2], None, *projected[3:]]
    return {
        "vid_nll_pass": [(*vid, 1e-5, FACTOR, *each) for each in passes]
        + [(*vid[:2], None, 0.0, FACTOR, False, None)],
        "projected_vid_nll_pass": [(*bare, 1e-5, FACTOR, *each) for each in passes]
        + [(*projected, 1e-5, FACTOR, True, None)],
        "attention_transfer_pass": [(*at, FACTOR, *each) for each in passes],
        "softened_kl_pass": [(*kd, 4.0, FACTOR, False, *each) for each in passes]
        + [(*kd[::-1], 4.0, FACTOR, True, True, upstream)],
        "rescale": [(vid[0], vid[2], upstream)],
    }


OPERATORS = sorted(
    name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastvid::")
)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_passes_the_checks_of_pytorch(name):
    for sample in samples()[name]:
        tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if sample[-1] is not None:  # called within backward
            sample = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in sample)
        elif sample[-2]:
            tests.pop()  # it would use the gradient that backward scales in place; the compiled losses follow
        torch.library.opcheck(getattr(torch.ops.fastvid, name).default, sample, test_utils=tests)


# --- torch.compile, and checkpoints


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@every_loss
def test_a_compiled_loss_has_the_bits_of_the_loss_at_every_batch_size(name, backend):
    torch._dynamo.reset()
    function = torch.compile(
        loss_of(name), fullgraph=True, backend=backend
    )  # fullgraph: raises at a graph break
    for batch in (2, 3):
        assert same_bits(results(function, INPUTS[name](batch)), results(loss_of(name), INPUTS[name](batch)))


@every_loss
def test_a_checkpointed_loss_keeps_no_gradient_and_agrees_up_to_one_rounding(name):
    inputs = INPUTS[name](2)
    loss = checkpoint(loss_of(name), *inputs, use_reentrant=False)
    assert not holds_gradient(loss)
    rounding = torch.finfo(
        inputs[0].dtype
    ).eps  # of the map's gradient, once with the upstream gradient in it and once without
    for mine, expected in zip(results(lambda *_: loss, inputs), results(loss_of(name), INPUTS[name](2))):
        torch.testing.assert_close(mine, expected, rtol=rounding, atol=rounding * expected.abs().max().item())


def holds_gradient(loss):
    """Whether the graph of the loss keeps a map's gradient that forward wrote."""
    node, nodes = loss.grad_fn, []
    while node is not None:
        nodes.append(node)
        node = node.next_functions[0][0] if node.next_functions else None
    return any(getattr(node, "gradient", None) is not None for node in nodes)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@every_loss
def test_a_loss_on_the_cpu_compiles_too(name, impl):
    torch._dynamo.reset()
    inputs = INPUTS[name](2, device="cpu", dtype=FP32)
    compiled = torch.compile(loss_of(name, impl), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, inputs), results(loss_of(name, "reference"), inputs))


@pytest.mark.parametrize(
    "module, student, teacher, precision",
    [
        pytest.param(
            lambda **given: fastvid.VIDLoss([4, 6], [8, 5], **given),
            [(4, 4, 4), (6, 2, 2)],
            [(8, 4, 4), (5, 2, 2)],
            BF16,
            id="vid",
        ),
        pytest.param(fastvid.ATLoss, [(4, 4, 4), (6, 2, 2)], [(8, 4, 4), (5, 2, 2)], FP32, id="at"),
        pytest.param(fastvid.KDLoss, [(10,)], [(10,)], FP32, id="kd"),
        pytest.param(
            lambda **given: fastvid.FitNetLoss(4, 8, **given), [(4, 4, 4)], [(8, 4, 4)], FP32, id="fitnet"
        ),
    ],
)
def test_a_compiled_module_agrees_with_the_module_at_every_batch_size(module, student, teacher, precision):
    torch._dynamo.reset()
    module = module(factor=FACTOR, impl="triton").to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        pair = [
            inputs_of(*(("B", *shape) for shape in shapes))(batch, learns=shapes is student)
            for shapes in (student, teacher)
        ]
        inputs = pair if isinstance(module, (fastvid.VIDLoss, fastvid.ATLoss)) else [maps[0] for maps in pair]
        with torch.autocast(DEVICE, BF16, enabled=precision == BF16):
            ours, expected = (
                results(function, inputs, [*module.parameters(), *pair[0]]) for function in (compiled, module)
            )
        for a, b in zip(
            ours, expected, strict=True
        ):  # the same kernels; batch norms may sum in another order
            assert (a - b).norm() <= 2 * torch.finfo(precision).eps * b.norm()


# --- training under autocast, and on several processes


class Distillation(nn.Module):
    """A student of one convolution and its VIDLoss in one module, as DistributedDataParallel wants them."""

    def __init__(self, impl="triton"):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Conv2d(3, 16, 1)
        self.loss = fastvid.VIDLoss([16], [16], variant="repdistiller", factor=FACTOR, impl=impl)
        self.to(DEVICE, memory_format=torch.channels_last)

    def forward(self, images, teacher_map):
        return self.loss([self.student(images)], [teacher_map])


def train(module, precision, images=slice(4), scale=2.0**16, steps=6):
    """Losses and changes of all parameters after some steps on one batch, and the last loss scale."""
    batch = [draw(4, channels, 4, 4, learns=False)[images] for channels in (3, 16)]
    start = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=4.0)
    scaler = torch.amp.GradScaler(DEVICE, enabled=precision == FP16, init_scale=scale)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, BF16 if precision == FP32 else precision, enabled=precision != FP32):
            loss = module(*batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        assert loss.dtype == FP32
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    return (
        losses,
        [parameter.detach() - before for parameter, before in zip(module.parameters(), start)],
        scaler.get_scale(),
    )


@pytest.mark.parametrize("precision", [BF16, FP16], ids=["bf16", "fp16"])
def test_training_under_autocast_agrees_with_the_reference(precision):
    (losses, changes, _), (expected, expected_changes, _) = (
        train(Distillation(impl), precision) for impl in ("triton", "reference")
    )
    # The reference rounds the mean and its gradient to 16 bits where Triton keeps fp32: half an eps each, at
    # random, so that of a mean over 1,024 elements 1/32 of it is left. A gradient of a parameter adds up
    # fewer and smaller terms: four roundings in full.
    eps = torch.finfo(precision).eps
    assert losses == pytest.approx(expected, abs=eps / 32) and expected[0] - expected[-1] > eps
    assert all(
        (ours - theirs).norm() <= 4 * eps * theirs.norm() for ours, theirs in zip(changes, expected_changes)
    )


def test_a_loss_scale_that_overflows_is_halved_until_training_goes_on():
    losses, changes, scale = train(Distillation(), FP16, scale=2.0**40, steps=25)
    assert 2.0**16 < scale < 2.0**40 and losses[0] == losses[1] > losses[-1]
    assert all(change.isfinite().all() and change.any() for change in changes)


def process(rank, folder):
    """One of two processes that train on half of the batch each; the first trains on the whole batch alone
    too."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    trained = {}
    for precision in (FP32, BF16):
        alone, together = Distillation(), Distillation()
        together.student.bias.data += (
            rank  # undone by the wrapper: it hands out the parameters of the first process
        )
        together = DistributedDataParallel(together)
        changes = train(together, precision, slice(2 * rank, 2 * rank + 2))[1]
        trained[precision] = [*together.parameters()], changes, rank == 0 and train(alone, precision)[1]
    torch.save(trained, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ddp_processes_agree_with_one_process_on_the_whole_batch(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }  # in the interpreter
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True, timeout=200)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # fp32: sums in another order. bf16: the convolutions' own gradients are up to 4e-2 off those in fp32,
    # with either implementation.
    for precision, tolerance in [(FP32, 1e-5), (BF16, 2**-4)]:
        (parameters, together, alone), (others, _, _) = first[precision], second[precision]
        assert same_bits(parameters, others)
        assert all(
            (ours - whole).norm() <= tolerance * whole.norm() and whole.any()
            for ours, whole in zip(together, alone, strict=True)
        )


# --- derivatives that Triton does not have and the reference has


def second_derivative(loss, x):
    return torch.autograd.grad(loss(x.requires_grad_()), x, create_graph=True)


def forward_mode(loss, x):
    with forward_ad.dual_level():
        return loss(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize(
    "derive, error",
    [
        (second_derivative, RuntimeError),
        (forward_mode, ValueError),
        (lambda loss, x: torch.func.jvp(loss, (x,), (torch.ones_like(x),)), ValueError),
    ],
    ids=["create_graph", "forward-mode", "jvp"],
)
@every_loss
def test_a_derivative_that_triton_does_not_have_is_refused_with_the_remedy(name, derive, error):
    first, *others = (tensor.detach() for tensor in INPUTS[name](2))
    with pytest.raises(error, match=f"{name} .*derivative in Triton: pass impl='reference'"):
        derive(lambda x: loss_of(name)(x, *others), first)


@pytest.mark.parametrize(
    "derive",
    [
        lambda loss, x: torch.func.grad(loss)(x),
        lambda loss, x: torch.autograd.grad(
            loss(x.requires_grad_()), x, torch.ones(2, device=x.device), is_grads_batched=True
        )[0],
    ],
    ids=["grad", "batched"],
)
@every_loss
def test_a_transform_of_torch_func_raises_or_agrees_with_the_reference(name, derive):
    first, *others = (tensor.detach() for tensor in INPUTS[name](2))
    expected = derive(lambda x: loss_of(name, "reference")(x, *others), first.clone())
    try:
        found = derive(lambda x: loss_of(name)(x, *others), first)
    except RuntimeError as error:
        assert any(
            phrase in str(error) for phrase in ("Batching rule not implemented", "functorch transforms")
        )
    else:
        torch.testing.assert_close(found, expected)


@every_loss
def test_references_have_the_first_and_second_derivatives_of_finite_differences(name):
    corner = (slice(4), slice(3), slice(2), slice(1))  # of a projection: from 3 hidden channels to 4
    inputs = [
        x.detach()[corner[: x.dim()]].double().contiguous().requires_grad_()
        for x in INPUTS[name](2, device="cpu", dtype=FP32)
    ]
    if name == "projected_vid_nll":
        inputs[3] = draw(2, 4, 2, 1, dtype=FP64, device="cpu")
    assert torch.autograd.gradcheck(loss_of(name, "reference"), inputs)
    assert torch.autograd.gradgradcheck(loss_of(name, "reference"), inputs)


# --- memory, and parameters that are views


@pytest.mark.parametrize("backward", [False, True], ids=["never-used", "after-backward"])
@every_loss
def test_maps_and_gradients_are_freed_without_the_garbage_collector(name, backward):
    def alive():
        return sum(
            type(thing) is torch.Tensor and thing.shape == inputs[0].shape for thing in gc.get_objects()
        )

    inputs = INPUTS[name](2)
    gc.collect()
    gc.disable()
    try:
        before, computed = alive(), inputs[0] * 1  # as a network's output: not a leaf
        freed, loss = weakref.ref(computed), loss_of(name)(computed, *inputs[1:])
        del computed
        assert freed() is not None, "backward needs it"
        if backward:
            loss.backward()
            assert freed() is None, "backward has been"
            for tensor in inputs:
                tensor.grad = None
        del loss
        assert freed() is None and alive() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "name, which",
    [("projected_vid_nll", 1), ("projected_vid_nll", 2), ("projected_vid_nll", 4), ("vid_nll", 2)],
)
def test_a_parameter_that_is_not_contiguous_gives_the_results_of_its_copy(name, which):
    inputs = INPUTS[name](2)
    views = [
        torch.stack([tensor, tensor + 1], dim=-1)[..., 0] if i == which else tensor
        for i, tensor in enumerate(inputs)
    ]
    ours, expected = (results(loss_of(name), given, inputs[:2]) for given in (views, inputs))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


def test_gradients_have_the_strides_of_what_they_are_gradients_of():
    inputs = [
        tensor for tensor in INPUTS["projected_vid_nll"](2) if tensor.requires_grad
    ]  # the weight is channels-last
    gradients = results(loss_of("projected_vid_nll"), INPUTS["projected_vid_nll"](2))[1:]
    assert [gradient.stride() for gradient in gradients] == [tensor.stride() for tensor in inputs]


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
@every_loss
def test_a_teacher_that_ran_in_inference_mode_gives_the_same_gradient(name, impl):
    first, *others = (tensor.detach() for tensor in INPUTS[name](2))
    with torch.inference_mode():
        inferred = [tensor.clone() for tensor in others]
    expected, found = (
        results(loss_of(name, impl), [first.requires_grad_(), *tensors]) for tensors in (others, inferred)
    )
    assert same_bits(expected, found)


# --- what only a GPU has


@pytest.mark.gpu
@every_loss
def test_a_captured_step_replays_the_bits_of_an_eager_step_without_synchronising(name):
    need_gpus(1)
    inputs, others = INPUTS[name](2), INPUTS[name](2, seed=9)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels
        results(loss_of(name), inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(loss_of(name), inputs)
    with torch.no_grad():
        for tensor, other in zip(inputs, others):
            tensor.copy_(other)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph.replay()
        eager = results(loss_of(name), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same_bits(captured, eager) and eager[0] != 0


@pytest.mark.gpu
@every_loss
def test_tensors_on_another_device_than_the_current_one_give_the_same_bits(name):
    need_gpus(2)
    there, here = (results(loss_of(name), INPUTS[name](2, device=device)) for device in ("cuda:1", "cuda:0"))
    assert torch.cuda.current_device() == 0 and all(tensor.device.index == 1 for tensor in there)
    assert same_bits([tensor.cpu() for tensor in there], [tensor.cpu() for tensor in here])


@pytest.mark.gpu
@every_loss
def test_auto_is_triton_for_cuda_tensors_and_refuses_other_layouts(name):
    need_gpus(1)
    first, *others = INPUTS[name](2)
    assert same_bits(
        results(loss_of(name, "auto"), [first, *others]), results(loss_of(name), [first, *others])
    )
    with pytest.raises(ValueError, match="side by side|needs channels-last maps"):
        loss_of(name, "auto")(
            first.t().contiguous().t() if name == "softened_kl" else first.contiguous(), *others
        )


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401 - an optimizer would, in either process

    mend()
    torch.multiprocessing.start_processes(
        process, args=sys.argv[1:], nprocs=2, start_method="fork"
    )  # imports are done, no thread runs
