"""The CPU path in blocks against the plain expressions: the same sums and gradients, whatever the blocks, layout and use."""

import pytest
import torch
from fastvid.kernels import blocked, reference

from fastvid import kernels

CASES = [
    pytest.param((4, 16, 8, 8), torch.bfloat16, id="stem-bf16"),
    pytest.param((3, 24, 5, 7), torch.float16, id="no-power-of-two-fp16"),
    pytest.param((5, 7, 9, 3), torch.float32, id="odd-fp32"),
    pytest.param((1, 1, 1, 1), torch.bfloat16, id="one-element"),
    pytest.param((0, 4, 3, 3), torch.bfloat16, id="empty"),
]
CALLS = {
    "vid_nll": lambda mean, target, **options: kernels.vid_nll(
        mean, target, torch.linspace(-1, 1, mean.shape[1]), **options
    ),
    "mean_squared_error": kernels.mean_squared_error,
    "attention_transfer": kernels.attention_transfer,
}


def maps(shape, dtype):
    return [
        torch.randn(shape).to(dtype).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2)
    ]


def loss_and_gradients(function, inputs, **options):
    loss = function(*inputs, factor=3.0, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("shape, dtype", CASES)
@pytest.mark.parametrize("block", [pytest.param(1, id="many-blocks"), pytest.param(65536, id="one-block")])
@pytest.mark.parametrize("name", CALLS)
def test_loss_and_gradients_are_those_of_the_reference(name, block, shape, dtype, monkeypatch):
    monkeypatch.setattr(blocked, "_BLOCK", block)
    inputs = maps(shape, dtype)
    assert blocked.fits(*inputs)
    ours, theirs = (loss_and_gradients(CALLS[name], inputs, impl=impl) for impl in ("auto", "reference"))
    for mine, wanted in zip(
        ours, theirs
    ):  # fp32 sums in another order, then one rounding to the maps' dtype: at most one ulp of it
        ulp = torch.finfo(mine.dtype).eps
        assert mine.dim() == 0 or mine.is_contiguous(memory_format=torch.channels_last)
        largest = wanted.abs().nan_to_num().max().item() if wanted.numel() else 0
        torch.testing.assert_close(mine, wanted, rtol=max(ulp, 2e-6), atol=1e-6 * largest, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_those_of_the_reference(name):
    inputs = maps((2, 3, 4, 5), torch.float32)

    def second(impl):
        (gradient,) = torch.autograd.grad(CALLS[name](*inputs, impl=impl), inputs[:1], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), inputs)

    for mine, wanted in zip(second("auto"), second("reference")):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("name", CALLS)
def test_nan_and_infinity_come_out_where_the_reference_has_them(name):
    for value in (float("nan"), float("inf"), -float("inf")):
        inputs = maps((2, 3, 4, 5), torch.float32)
        with torch.no_grad():
            inputs[0][0, 1, 2, 3] = value
        ours, theirs = (loss_and_gradients(CALLS[name], inputs, impl=impl) for impl in ("auto", "reference"))
        for mine, wanted in zip(ours, theirs):
            assert torch.equal(mine.isnan(), wanted.isnan()) and torch.equal(mine.isinf(), wanted.isinf())


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param([torch.zeros(2, 3, 4, 5)] * 2, id="nchw"),
        pytest.param(
            [torch.zeros(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last)] * 2,
            id="fp64",
        ),
        pytest.param(
            [torch.zeros(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)] * 2,
            id="another-device",
        ),
    ],
)
def test_maps_that_blocks_do_not_serve_take_the_reference(inputs):
    assert not blocked.fits(*inputs)
    for function in CALLS.values():
        if inputs[0].device.type == "cpu":
            assert torch.equal(function(*inputs), function(*inputs, impl="reference"))


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_a_teacher_that_ran_in_inference_mode_teaches_as_any_other(name, impl):
    student, teacher = (x.detach() for x in maps((2, 3, 4, 5), torch.float32))
    with torch.inference_mode():
        inferred = teacher.clone()
    gradients = [
        torch.autograd.grad(CALLS[name](student.requires_grad_(), x, impl=impl), student)[0]
        for x in (teacher, inferred)
    ]
    torch.testing.assert_close(*gradients)


def test_the_sums_themselves_in_float32_are_those_of_the_reference():
    mean, target = maps((4, 16, 8, 8), torch.float32)
    torch.testing.assert_close(
        blocked.squared_residuals(mean, target), (target - mean).square().sum(dim=(0, 2, 3))
    )
    torch.testing.assert_close(blocked.energy(mean), reference.energy(mean))


@pytest.mark.parametrize("name", CALLS)
def test_several_upstream_gradients_at_once_give_each_its_gradient(name):
    inputs = maps((2, 3, 4, 5), torch.float32)
    loss, upstream = CALLS[name](*inputs), torch.tensor([1.0, -2.0])
    (batched,) = torch.autograd.grad(loss, inputs[:1], upstream, is_grads_batched=True, retain_graph=True)
    (alone,) = torch.autograd.grad(loss, inputs[:1])
    torch.testing.assert_close(batched, upstream.view(2, 1, 1, 1, 1) * alone)


@pytest.mark.parametrize("name", CALLS)
def test_a_transform_of_something_else_than_the_maps_leaves_the_loss_as_it_is(name):
    inputs = [x.detach() for x in maps((2, 3, 4, 5), torch.float32)]
    gradient = torch.func.grad(lambda weight: weight * CALLS[name](*inputs))(torch.tensor(3.0))
    torch.testing.assert_close(gradient, CALLS[name](*inputs, impl="reference"))


@pytest.mark.parametrize("name", CALLS)
def test_what_the_caller_made_the_default_dtype_or_device_changes_nothing(name):
    inputs = maps((4, 16, 8, 8), torch.float32)
    expected = loss_and_gradients(CALLS[name], inputs)
    scale = torch.linspace(-1, 1, 16)  # made with the usual defaults
    call = {
        **CALLS,
        "vid_nll": lambda mean, target, **options: kernels.vid_nll(mean, target, scale, **options),
    }[name]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            changed = loss_and_gradients(call, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(changed, expected))
