"""The reference against hand-worked numbers, PyTorch's own losses, closed-form gradients and properties."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastvid import kernels

reference = kernels.reference

SHAPES = [
    pytest.param((4, 16, 8, 8), id="stem"),
    pytest.param((3, 24, 5, 7), id="no-power-of-two"),
    pytest.param((1, 1, 1, 1), id="one-element"),
]
# float64 against float64 in another order of summation: at most 4·24·64 terms, each off by 2^-53
CLOSE = {"rel": 1e-12, "abs": 1e-13}


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def raw(variance):
    """The scale parameter whose softplus is `variance`."""
    return math.log(math.expm1(variance))


# --- hand-worked numbers


def test_vid_nll_of_two_channels_by_hand():
    mean = torch.tensor([[[[0.0, 0.0]], [[1.0, 3.0]]]])
    target = torch.tensor([[[[1.0, -1.0]], [[3.0, -1.0]]]])
    raw_scale = torch.tensor([raw(1.0), raw(4.0)])
    # S = (1 + 1, 4 + 16), M = 2:  ½ [2/1 + 2·ln 1 + 20/4 + 2·ln 4] / 4 = (7 + 2.772589)/8
    assert reference.vid_nll(mean, target, raw_scale, eps=0.0).item() == pytest.approx(1.2215736, abs=1e-6)


def test_vid_nll_adds_an_eps_of_1e_5_unless_told():
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for function in (reference.vid_nll, kernels.vid_nll):
        assert function(zero, zero, torch.tensor([-200.0], dtype=torch.float64)).item() == pytest.approx(
            0.5 * math.log(1e-5), **CLOSE
        )


@pytest.mark.parametrize(
    "bias, expected",
    [
        pytest.param(torch.tensor([0.5]), 2.0, id="bias"),  # mean = 3·1 - 1·2 + 0.5 = 1.5, ½·(3.5 - 1.5)²
        pytest.param(None, 3.125, id="no-bias"),  # mean = 1, ½·2.5²
    ],
)
def test_projected_vid_nll_of_one_position_by_hand(bias, expected):
    hidden, weight = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)
    value = reference.projected_vid_nll(
        hidden, weight, bias, torch.full((1, 1, 1, 1), 3.5), torch.tensor([raw(1.0)]), eps=0.0
    )
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_attention_transfer_of_two_positions_by_hand():
    student = torch.tensor([[[[1.0, 0.0]], [[-1.0, 0.0]]]])  # mean squares (1, 0): Q = (1, 0)
    teacher = torch.tensor([[[[3.0**0.5, 2.0]]]])  # (3, 4): Q = (0.6, 0.8)
    # (0.4² + 0.8²)/2
    assert reference.attention_transfer(student, teacher).item() == pytest.approx(0.4, abs=1e-6)


def test_softened_kl_of_two_images_by_hand():
    teacher = torch.tensor([[4 * math.log(3), 0.0], [1.0, 2.0]])  # at T = 4: (¾, ¼)
    student = torch.tensor([[0.0, 0.0], [1.0, 2.0]])  # (½, ½); the second image agrees
    # 4²/2 · (¾ ln 1.5 + ¼ ln 0.5) = 8 · 0.1308121
    for function in (reference.softened_kl, kernels.softened_kl):
        assert function(student, teacher).item() == pytest.approx(1.0464966, abs=1e-6)


# --- independent oracles


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-5, 1e-1])
def test_vid_nll_is_pytorchs_gaussian_likelihood(shape, eps):
    mean, target, raw_scale = draw(*shape), draw(*shape, seed=1), draw(shape[1], seed=2)
    variance = (torch.log1p(raw_scale.exp()) + eps).view(1, -1, 1, 1).expand(shape)
    expected = F.gaussian_nll_loss(mean, target, variance, full=False, eps=1e-12)
    assert reference.vid_nll(mean, target, raw_scale, eps=eps).item() == pytest.approx(
        expected.item(), **CLOSE
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_projected_vid_nll_is_the_likelihood_of_a_matrix_product(shape):
    hidden, target = draw(shape[0], 5, *shape[2:]), draw(*shape, seed=1)
    weight, bias, raw_scale = draw(shape[1], 5, 1, 1, seed=2), draw(shape[1], seed=3), draw(shape[1], seed=4)
    mean = torch.einsum("ck,bkhw->bchw", weight[:, :, 0, 0], hidden) + bias[:, None, None]
    expected = reference.vid_nll(mean, target, raw_scale)
    assert reference.projected_vid_nll(hidden, weight, bias, target, raw_scale).item() == pytest.approx(
        expected.item(), **CLOSE
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_softened_kl_is_pytorchs_divergence_times_t_squared(temperature):
    student, teacher = 5 * draw(6, 10), 5 * draw(6, 10, seed=1)
    expected = F.kl_div(
        F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="batchmean"
    )
    value = reference.softened_kl(student, teacher, temperature=temperature)
    assert value.item() == pytest.approx(temperature**2 * expected.item(), **CLOSE)


# --- gradients


@pytest.mark.parametrize("shape", SHAPES)
def test_vid_gradients_are_the_closed_forms(shape):
    mean, target, a = (
        draw(*shape).requires_grad_(),
        draw(*shape, seed=1),
        draw(shape[1], seed=2).requires_grad_(),
    )
    reference.vid_nll(mean, target, a).backward()
    v, size = torch.log1p(a.detach().exp()) + 1e-5, mean.numel()
    v = v[:, None, None]
    residual = mean.detach() - target
    torch.testing.assert_close(mean.grad, residual / (v * size), rtol=1e-12, atol=0)
    expected = torch.sigmoid(a.detach()) / (2 * size) * (1 / v - residual**2 / v**2).sum(dim=(0, 2, 3))
    torch.testing.assert_close(a.grad, expected, rtol=1e-10, atol=1e-13)  # the difference cancels some digits


# --- properties


def test_vid_is_least_where_the_variance_is_the_mean_square_residual():
    mean, target = draw(4, 3, 5, 5), draw(4, 3, 5, 5, seed=1)
    variance = (mean - target).square().mean(dim=(0, 2, 3))
    best = torch.log(torch.expm1(variance - 1e-5)).requires_grad_()
    loss = reference.vid_nll(mean, target, best)
    loss.backward()
    assert best.grad.abs().max() < 1e-14
    for channel in range(3):
        for step in (-0.1, 0.1):
            moved = best.detach().clone()
            moved[channel] += step
            assert reference.vid_nll(mean, target, moved) > loss


def test_attention_transfer_ignores_positive_factors_per_image_and_is_zero_for_equal_maps():
    student, teacher = draw(3, 4, 5, 5), draw(3, 6, 5, 5, seed=1)
    factor = torch.tensor([0.01, 3.0, 1e4], dtype=torch.float64).view(3, 1, 1, 1)
    expected = reference.attention_transfer(student, teacher).item()
    assert expected > 0
    assert reference.attention_transfer(factor * student, teacher).item() == pytest.approx(expected, **CLOSE)
    assert reference.attention_transfer(student, factor * teacher).item() == pytest.approx(expected, **CLOSE)
    assert reference.attention_transfer(student, -student).item() == 0


def test_attention_transfer_of_a_dead_map_is_finite_and_so_is_its_gradient():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = kernels.attention_transfer(student, torch.ones(2, 3, 4, 4))
    value.backward()
    assert value.item() == pytest.approx(1 / 16)  # Q is 0 here and 1/4 there
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softened_kl_is_zero_for_equal_distributions_and_positive_otherwise(temperature):
    student, teacher = draw(6, 10), draw(6, 10, seed=1)
    assert reference.softened_kl(student, student + 3, temperature=temperature).item() == pytest.approx(
        0, abs=1e-12
    )
    for row in range(6):
        assert (
            reference.softened_kl(student[row : row + 1], teacher[row : row + 1], temperature=temperature) > 0
        )


def test_softened_kl_stays_finite_where_a_class_has_no_probability():
    logits = torch.tensor([[1e4, -1e4]])
    assert kernels.softened_kl(logits, logits).item() == 0
    assert kernels.softened_kl(logits, -logits).item() == pytest.approx(
        16 * 2e4 / 4
    )  # T² times the difference of logits over T


# --- the public functions on a CPU, in every dtype

CALLS = {  # maps x and y; logits far apart, so that little cancels
    "vid_nll": lambda f, x, y: f(x, y, x.new_zeros(3)),
    "mean_squared_error": lambda f, x, y: f(x, y),
    "projected_vid_nll": lambda f, x, y: f(
        x, torch.eye(3, dtype=x.dtype, device=x.device)[:, :, None, None], None, y, x.new_zeros(3)
    ),
    "attention_transfer": lambda f, x, y: f(x, y),
    "softened_kl": lambda f, x, y: f(8 * x[:, :, 0, 0], 8 * y[:, :, 0, 0]),
}
each_function = pytest.mark.parametrize("name", CALLS)


def call(name, x, y):
    return CALLS[name](getattr(kernels, name), x, y)


@each_function
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_is_that_of_the_same_numbers_in_fp64_and_gradients_keep_their_dtype(name, dtype, device):
    x, y = (draw(2, 3, 4, 4, seed=seed).to(device, dtype) for seed in (0, 1))
    value = call(name, x.requires_grad_(), y)
    assert value.shape == () and value.dtype == (dtype if dtype == torch.float64 else torch.float32)

    def exact(*tensors):
        return getattr(reference, name)(*(t if t is None else t.double() for t in tensors))

    # fp32 rounds logarithms, differences, squares, products and sums by 2^-24 each, and the differences
    # cancel at most one digit.
    assert value.item() == pytest.approx(CALLS[name](exact, x, y).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.dtype == dtype and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["vid_nll", "projected_vid_nll"])
def test_residuals_of_300_in_fp16_do_not_overflow(name):
    x, y = torch.full((2, 3, 4, 4), 300.0, dtype=torch.float16), torch.zeros(2, 3, 4, 4, dtype=torch.float16)
    v = math.log(2) + 1e-5
    assert call(name, x, y).item() == pytest.approx((300**2 / v + math.log(v)) / 2, rel=1e-6)


def test_attention_of_values_of_300_in_fp16_does_not_overflow():
    x, y = torch.full((1, 2, 1, 2), 300.0, dtype=torch.float16), torch.tensor([[[[1.0, 0.0]]]])
    assert kernels.attention_transfer(x, y).item() == pytest.approx(1 - 0.5**0.5, rel=1e-6)


@each_function
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_either_map_makes_the_loss_nan(name, side):
    x, y = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    (x if side == "student" else y)[0, 0, 0, 0] = math.nan
    assert call(name, x, y).isnan()
