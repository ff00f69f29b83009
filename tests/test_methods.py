import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastvid
from fastvid.config import OPTION_GROUPS, ATOptions, FitNetOptions, KDOptions, TrainConfig, VIDOptions
from fastvid.methods import METHODS, Terms, build
from fastvid.methods.base import clip_to_weights, information
from fastvid.methods.vid import EPS, VARIANTS, least_variance
from fastvid.student import Student
from fastvid.wresnet import TAPS, WideResNet

torch.manual_seed(0)
STUDENT = WideResNet(10, 1)  # 16, 16, 32, 64 channels
TEACHER = WideResNet(10, 2)  # 16, 32, 64, 128
LABELS = torch.tensor([3, 0, 9, 3])

# fp32 against float64 on the same inputs. A pairwise sum of n terms has a relative error of log2(n)·2^-24,
# with n <= 2^17. About four such sums follow one another (convolution, batch statistics, squares, taps): the
# error is at most 4·17·6e-8 = 4e-6 of the value.
CLOSE = {"rel": 1e-5}


def activations(network, seed):
    """Of four random images in training mode, with logits as far apart as those of a trained network."""
    torch.manual_seed(seed)
    with torch.no_grad():
        taken = network(torch.randn(4, 3, 16, 16))
    return taken._replace(logits=8 * taken.logits)


@pytest.fixture
def student():
    return activations(STUDENT, 1)


@pytest.fixture
def teacher():
    return activations(TEACHER, 2)


def method(name, **options):
    torch.manual_seed(0)
    return build(name, TrainConfig(method=(name,), **options), STUDENT, TEACHER)


# --- the formulas once more, in NumPy and float64


def log_softmax(logits):
    logits = logits.double().numpy()
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def cross_entropy(student):
    return -log_softmax(student.logits)[range(4), LABELS].mean()


def softened(student, teacher, temperature):
    """T² times the KL divergence.

    In fp32, each log-probability has an error of two roundings of 2^-24. Their difference cancels digits, so
    the tolerance is absolute.
    """
    of_student, of_teacher = (log_softmax(a.logits.double() / temperature) for a in (student, teacher))
    p_student, p_teacher = np.exp(of_student), np.exp(of_teacher)
    tolerance = temperature**2 * 4 * 2.0**-24 * max(-of_student.min(), -of_teacher.min())
    return pytest.approx(
        temperature**2 * (p_teacher * np.log(p_teacher / p_student)).sum() / 4, abs=tolerance
    )


def attention_distance(student, teacher):
    def attention(features):
        energy = (features.double().numpy() ** 2).mean(axis=1)
        return energy / np.sqrt((energy**2).sum(axis=(1, 2), keepdims=True))

    return sum(
        ((attention(s) - attention(t)) ** 2).mean() for s, t in zip(student.stages[1:], teacher.stages[1:])
    )


def likelihood(term, student, teacher):
    """Of a VID term, through PyTorch's own Gaussian likelihood, with the variances expanded to whole maps."""
    loss = copy.deepcopy(term.loss).double()
    variant = term.variant
    total = 0.0
    for i, tap in enumerate(variant.taps):
        s, t = (
            (a.activated if variant.activated else a.stages)[TAPS.index(tap)].double()
            for a in (student, teacher)
        )
        mean = loss.regressors[i].last(loss.regressors[i].hidden(s))
        floor = EPS
        if variant.floor:
            floor += least_variance(loss.factor, 0.1, loss.regressors[i].last.in_channels, t.shape[1])
        variance = (torch.log1p(loss.raw_scales[i].exp()) + floor)[:, None, None].expand_as(t)
        total += F.gaussian_nll_loss(mean, t, variance, full=False, eps=1e-12)
    return total.item()


# --- terms and totals


def test_the_student_alone_minimises_cross_entropy(student):
    terms = method("student")(student, None, LABELS)
    assert isinstance(terms, Terms) and terms.task.dtype == terms.transfer.dtype == torch.float32
    assert terms.task.item() == pytest.approx(cross_entropy(student), **CLOSE)
    assert terms.transfer.item() == 0


@pytest.mark.parametrize(
    "alpha, temperature",
    [
        pytest.param(KDOptions.alpha, KDOptions.temperature, id="default"),
        pytest.param(0.3, 2.0, id="other-weights"),
        pytest.param(1.0, 1.0, id="teacher-alone"),
    ],
)
def test_kd_is_one_minus_alpha_cross_entropy_plus_alpha_t_squared_divergence(
    alpha, temperature, student, teacher
):
    terms = method("kd", kd=KDOptions(alpha, temperature))(student, teacher, LABELS)
    assert terms.task.item() == pytest.approx((1 - alpha) * cross_entropy(student), **CLOSE)
    assert terms.transfer.item() / alpha == softened(student, teacher, temperature)


def test_defaults_are_those_of_the_published_recipes():
    assert (KDOptions().alpha, KDOptions().temperature) == (0.9, 4.0)
    assert ATOptions().weight == 1000
    assert (FitNetOptions().weight, FitNetOptions().tap, FitNetOptions().schedule) == (
        100,
        ("group2",),
        "joint",
    )
    assert VIDOptions().variant == "paper"


def test_at_is_cross_entropy_plus_beta_times_the_distance_of_attention_maps_of_the_three_groups(
    student, teacher
):
    terms = method("at", at=ATOptions(weight=500.0))(student, teacher, LABELS)
    assert terms.task.item() == pytest.approx(cross_entropy(student), **CLOSE)
    assert terms.transfer.item() == pytest.approx(500 * attention_distance(student, teacher), **CLOSE)


@pytest.mark.parametrize("taps", [("stem",), ("group2",), ("group3",), ("group1", "group3"), ("all",)])
def test_fitnet_is_cross_entropy_plus_the_weighted_square_errors_of_the_regressed_maps_to_the_hints(
    taps, student, teacher
):
    ours = method("fitnet", fitnet=FitNetOptions(weight=7.0, tap=taps))
    names = TAPS if taps == ("all",) else taps
    expected = 0.0
    for tap, regressor in zip(names, ours.transfers["fitnet"].loss.regressors):
        expected += 7 * square_error(regressor, TAPS.index(tap), student, teacher)
    terms = ours(student, teacher, LABELS)
    assert terms.task.item() == pytest.approx(cross_entropy(student), **CLOSE)
    assert terms.transfer.item() == pytest.approx(expected, **CLOSE)


def square_error(regressor, tap, student, teacher):
    convolution, batch_norm, _ = regressor
    nn.init.uniform_(batch_norm.weight, 0.5, 1.5)
    nn.init.normal_(batch_norm.bias)
    s, t = (a.activated[tap].double().numpy() for a in (student, teacher))
    weight, gamma, beta = (
        p.detach().double().numpy()
        for p in (convolution.weight[:, :, 0, 0], batch_norm.weight, batch_norm.bias)
    )
    mapped = np.einsum("ts,bshw->bthw", weight, s)
    mean, variance = (v[:, None, None] for v in (mapped.mean(axis=(0, 2, 3)), mapped.var(axis=(0, 2, 3))))
    mapped = np.maximum(
        (mapped - mean) / np.sqrt(variance + 1e-5) * gamma[:, None, None] + beta[:, None, None], 0
    )
    return ((mapped - t) ** 2).mean()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weight", [None, 3.0], ids=["own-weight", "given-weight"])
def test_vid_is_cross_entropy_plus_lambda_times_the_gaussian_likelihood_of_the_teacher_maps(
    variant, weight, student, teacher
):
    ours = method("vid", vid=VIDOptions(variant, weight))
    term = ours.transfers["vid"]
    for raw_scale in term.loss.raw_scales:
        nn.init.normal_(raw_scale)
    own = {"paper": 30, "authors": 30, "repdistiller": 1}[variant]
    expected = {None: own}.get(weight, weight) * likelihood(term, student, teacher)
    terms = ours(student, teacher, LABELS)
    assert terms.task.item() == pytest.approx(cross_entropy(student), **CLOSE)
    assert terms.transfer.item() == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("other", ["at", "vid"])
def test_a_sum_adds_the_transfer_terms_and_keeps_kds_share_of_cross_entropy(other, student, teacher):
    whole = method(f"kd+{other}")(student, teacher, LABELS)
    kd, alone = (method(name)(student, teacher, LABELS) for name in ("kd", other))
    assert whole.task.item() == pytest.approx(0.1 * cross_entropy(student), **CLOSE)
    assert whole.transfer.item() == pytest.approx(kd.transfer.item() + alone.transfer.item(), **CLOSE)


def test_every_group_of_options_has_its_method():
    assert tuple(METHODS) == OPTION_GROUPS


@pytest.mark.parametrize("name", ["kd", "fitnet", "at", "vid"])
def test_terms_stay_fp32_under_bf16_autocast_and_close_to_those_in_fp32(name, student, teacher):
    ours = method(name)
    exact = copy.deepcopy(ours)(student, teacher, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        terms = ours(student, teacher, LABELS)
    assert terms.task.dtype == terms.transfer.dtype == torch.float32
    # bf16 rounds weights, inputs and outputs of up to three convolutions by 2^-9 each, and the loss is
    # quadratic in them: 2·9·2^-9
    assert terms.transfer.item() == pytest.approx(exact.transfer.item(), rel=18 * 2**-9)


# --- two-stage FitNet


def test_two_stage_fitnet_learns_from_the_hint_alone_and_then_from_the_labels_alone(student, teacher):
    ours = method("fitnet", fitnet=FitNetOptions(schedule="two-stage", hint_share=0.3))
    joint = method("fitnet")(student, teacher, LABELS)
    for progress, shares in [(0.0, (0, 1)), (0.29, (0, 1)), (0.3, (1, 0)), (0.99, (1, 0)), (0.1, (0, 1))]:
        ours.begin_epoch(progress)
        terms = ours(student, teacher, LABELS)
        assert (terms.task.item(), terms.transfer.item()) == (
            joint.task.item() * shares[0],
            joint.transfer.item() * shares[1],
        ), progress


def test_joint_fitnet_does_not_change_with_the_epochs(student, teacher):
    ours = method("fitnet")
    before = ours(student, teacher, LABELS)
    ours.begin_epoch(0.9)
    assert ours(student, teacher, LABELS) == before


# --- the constants of VID's variants


@pytest.mark.parametrize("variant, taps", [("paper", TAPS), ("authors", TAPS), ("repdistiller", TAPS[1:])])
def test_a_variant_of_vid_matches_residual_sums_at_its_taps(variant, taps):
    assert (VARIANTS[variant].taps, VARIANTS[variant].activated) == (taps, False)
    assert list(method("vid", vid=VIDOptions(variant)).variances()) == list(taps)


@pytest.mark.parametrize(
    "variant, first, widths, bias",
    [
        ("paper", [], [14], True),
        ("authors", [nn.BatchNorm2d, nn.ReLU], [24], False),
        ("repdistiller", [], [7, 7], False),
    ],
)
def test_a_variant_of_vid_has_its_regressor(variant, first, widths, bias):
    def layer(module):
        if isinstance(module, nn.Conv2d):
            return module.in_channels, module.out_channels, module.kernel_size, module.bias is not None
        return type(module)

    (regressor,) = fastvid.VIDLoss([5], [7], variant=variant).regressors
    norm = [] if variant == "repdistiller" else [nn.BatchNorm2d]
    expected, before = list(first), 5
    for width in widths:
        expected += [(before, width, (1, 1), False), *norm, nn.ReLU]
        before = width
    assert [layer(module) for module in regressor.hidden] == expected
    assert layer(regressor.last) == (before, 7, (1, 1), bias)


@pytest.mark.parametrize(
    "variant, first, floors",
    [
        # factor·learning rate·(0.12·K + 1)/C for K = 14 and 16 hidden units, C = 7 and 8
        pytest.param("paper", 0.3, (0.2 * 2.68 / 7, 0.2 * 2.92 / 8), id="paper"),
        pytest.param("repdistiller", 5.0, (0.0, 0.0), id="repdistiller"),
    ],
)
def test_variances_start_above_their_floor_and_never_fall_below_it(variant, first, floors):
    loss = fastvid.VIDLoss([5, 6], [7, 8], variant=variant, factor=2.0)
    assert [v.shape for v in loss.variances()] == [(7,), (8,)]
    for variances, floor in zip(loss.variances(), floors):
        torch.testing.assert_close(
            variances, torch.full_like(variances, first + floor + EPS), rtol=0, atol=2e-5
        )
    for raw_scale in loss.raw_scales:
        nn.init.constant_(raw_scale, -90.0)
    for variances, floor in zip(loss.variances(), floors):
        torch.testing.assert_close(variances, torch.full_like(variances, floor + EPS))
    assert loss([m.detach() for m in maps((5, 6), 1)], maps((7, 8), 2)).isfinite()


def test_the_floor_follows_the_learning_rate():
    loss = fastvid.VIDLoss(5, 7, factor=2.0)
    before = loss.variances()[0]
    loss.set_learning_rate(0.02)
    fallen = before - loss.variances()[0]
    torch.testing.assert_close(fallen, torch.full_like(fallen, 2.0 * 0.08 * 2.68 / 7))
    assert "learning_rate" not in loss.state_dict()


@pytest.mark.parametrize("factor", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("learning_rate", [0.1, 0.004])
def test_the_regressor_settles_at_its_floor(factor, learning_rate):
    """SGD on the whole regressor, with variances at their floor: the loss falls instead of growing."""
    torch.manual_seed(0)
    loss = fastvid.VIDLoss(8, 16, factor=factor, learning_rate=learning_rate)
    nn.init.constant_(loss.raw_scales[0], -90.0)
    student_map, teacher_map = torch.randn(16, 8, 8, 8), torch.randn(16, 16, 8, 8)
    optimizer = torch.optim.SGD(loss.regressors.parameters(), learning_rate, 0.9, nesterov=True)
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        value = loss(student_map, teacher_map)
        value.backward()
        loss.clip_gradients()
        optimizer.step()
        values.append(value.item())
    assert max(values[50:]) <= values[0]


@pytest.mark.parametrize("scale, limited", [(1e6, True), (1e-6, False)])
def test_gradients_of_a_regressor_are_clipped_to_a_share_of_its_weights(scale, limited):
    loss = fastvid.VIDLoss(5, 7)
    (scale * loss(*maps((5,), 1), *maps((7,), 2))).backward()
    before = [p.grad.clone() for p in loss.regressors.parameters()]
    loss.clip_gradients()
    for parameter, gradient in zip(loss.regressors.parameters(), before):
        if limited:
            assert parameter.grad.norm() <= 0.3001 * parameter.norm()
            assert F.cosine_similarity(parameter.grad.flatten(), gradient.flatten(), dim=0) > 0.9999
        else:
            assert torch.equal(parameter.grad, gradient)


def test_clipping_leaves_parameters_without_a_gradient_alone():
    clip_to_weights(fastvid.VIDLoss(5, 7))


def test_no_hidden_unit_can_die():
    loss = fastvid.VIDLoss(5, 7)
    hidden = loss.regressors[0].hidden(torch.randn(8, 5, 4, 4) * 100 - 1000)
    assert (hidden.amax(dim=(0, 2, 3)) > 0).all()


def test_information_is_that_of_a_gaussian_with_the_residual_as_variance():
    torch.manual_seed(0)
    target = torch.randn(64, 2, 8, 8) * torch.tensor([1.0, 3.0])[None, :, None, None]
    noise = torch.randn_like(target)
    explained, nats = information(target + 0.5 * noise, target)
    assert explained == pytest.approx(1 - 2 * 0.25 / (1 + 9), abs=0.01)
    assert nats == pytest.approx(0.5 * (math.log(1 / 0.25) + math.log(9 / 0.25)) / 2, abs=0.01)
    constant = target.mean(dim=(0, 2, 3), keepdim=True).expand_as(target)
    assert information(constant, target) == pytest.approx((0, 0), abs=1e-4)


@pytest.mark.parametrize("variant, changes", [("paper", False), ("repdistiller", True)])
def test_weight_decay_pulls_the_variances_in_repdistiller_only_and_everything_else_in_both(variant, changes):
    config = TrainConfig(method=("vid",), vid=VIDOptions(variant))
    one = Student(
        "vid", WideResNet(10, 1), build("vid", config, STUDENT, TEACHER), config, torch.device("cpu")
    )
    parameters = dict(one.network.named_parameters()) | dict(one.method.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    one.optimizer.step()
    moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
    scales = {name for name in parameters if "raw_scales" in name}
    assert len(scales) == len(VARIANTS[variant].taps)
    still = {name for name, value in before.items() if not value.any()}  # zero at the start stays zero
    assert moved == set(parameters) - still - (set() if changes else scales)


# --- the losses as modules of their own, on maps of any width


def maps(channels, seed):
    torch.manual_seed(seed)
    return [torch.randn(2, c, size, size + 1) for c, size in zip(channels, (6, 3))]


LOSSES = [  # and their numbers of parameters; vid-paper has per tap: 2 weights, bias, scale
    pytest.param(lambda: fastvid.VIDLoss([5, 6], [7, 8]), 2 * 4, id="vid-paper"),
    pytest.param(
        lambda: fastvid.VIDLoss([5, 6], [7, 8], variant="repdistiller"), 2 * 4, id="vid-repdistiller"
    ),
    pytest.param(lambda: fastvid.FitNetLoss([5, 6], [7, 8]), 2 * 3, id="fitnet"),
]


@pytest.mark.parametrize("make", [fastvid.VIDLoss, fastvid.FitNetLoss])
def test_a_single_pair_of_maps_needs_no_lists(make):
    torch.manual_seed(0)
    single, listed = make(5, 7), make([5], [7])
    listed.load_state_dict(single.state_dict())
    (student_map,), (teacher_map,) = maps((5,), 1), maps((7,), 2)
    assert torch.equal(single(student_map, teacher_map), listed([student_map], [teacher_map]))


@pytest.mark.parametrize("make, count", LOSSES)
def test_every_parameter_of_a_loss_is_registered_learns_and_is_saved(make, count):
    loss, student_maps, teacher_maps = make(), maps((5, 6), 1), maps((7, 8), 2)
    parameters = dict(loss.named_parameters())
    assert len(parameters) == count and set(parameters) <= set(loss.state_dict())
    start = copy.deepcopy(parameters)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    value = loss(student_maps, teacher_maps)
    assert value.shape == () and value.dtype == torch.float32
    value.backward()
    optimizer.step()
    assert [
        name for name, p in parameters.items() if torch.equal(p, start[name])
    ] == []  # mdistiller's variances never moved
    restored = make()
    restored.load_state_dict(loss.state_dict())
    assert restored(student_maps, teacher_maps).item() == loss(student_maps, teacher_maps).item()


@pytest.mark.parametrize("make, count", LOSSES)
def test_the_gradient_of_a_loss_reaches_the_student_maps(make, count):
    student_maps = [m.requires_grad_() for m in maps((5, 6), 1)]
    make()(student_maps, maps((7, 8), 2)).backward()
    assert student_maps[0].grad.abs().sum() > 0


def test_attention_loss_adds_pairs_of_maps_of_different_widths():
    student_maps, teacher_maps = maps((5, 6), 1), maps((7, 8), 2)
    each = [fastvid.ATLoss()([s], [t]) for s, t in zip(student_maps, teacher_maps)]
    assert (
        fastvid.ATLoss()(student_maps, teacher_maps).item() == pytest.approx(sum(each).item(), **CLOSE)
        and min(each) > 0
    )


def test_kd_loss_alone_has_the_published_temperature(student, teacher):
    assert fastvid.KDLoss()(student.logits, teacher.logits).item() == softened(student, teacher, 4)


def test_vid_loss_alone_is_the_paper_variant_without_a_weight(student, teacher):
    loss = fastvid.VIDLoss([16, 16, 32, 64], [16, 32, 64, 128])
    term = method("vid", vid=VIDOptions(weight=1.0)).transfers["vid"]
    term.loss.load_state_dict(loss.state_dict())
    assert loss(student.stages, teacher.stages).item() == sum(term(student, teacher).values()).item()


def test_an_unknown_variant_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="no variant 'mdistiller': choose from paper, authors, repdistiller"):
        fastvid.VIDLoss([5], [7], variant="mdistiller")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: fastvid.VIDLoss([5], [7, 8]), id="vid-channels"),
        pytest.param(lambda: fastvid.VIDLoss([5], [7])(maps((5, 6), 1), maps((7, 8), 2)), id="vid-maps"),
        pytest.param(lambda: fastvid.ATLoss()(maps((5, 6), 1), maps((7,), 2)), id="at-maps"),
    ],
)
def test_lists_of_different_lengths_are_refused_rather_than_cut(call):
    with pytest.raises(ValueError):
        call()


def test_a_hint_of_another_resolution_is_refused_rather_than_broadcast():
    with pytest.raises(ValueError, match="agree in B, H and W"):
        fastvid.FitNetLoss(5, 7)(torch.randn(2, 5, 4, 4), torch.randn(2, 7, 4, 1))
