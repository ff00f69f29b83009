import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastvid.errors import InputError
from fastvid.loader import EvalLoader
from fastvid.wresnet import WideResNet, channels, frozen


def network(depth=10, width=2, *, train=False, num_classes=10):
    """A network in float64, with batch norms that are not neutral, so that a wrong order or factor shows."""
    torch.manual_seed(0)
    net = WideResNet(depth, width, num_classes).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.3)
    nn.init.normal_(net.fc.bias)
    return net.train(train)


def images(count=3, size=8):
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def flat(activations):
    return [*activations.stages, *activations.activated, activations.logits]


# --- the same network in NumPy, float64, from the weights of a state dict


class InNumpy:
    def __init__(self, net):
        state = net.state_dict()  # copied, because batch norms update their statistics
        self.weights = {name: value.detach().numpy().copy() for name, value in state.items()}
        self.training, self.blocks = net.training, (net.depth - 4) // 6

    def conv(self, x, name, stride=1):
        kernel = self.weights[f"{name}.weight"]
        size = kernel.shape[-1]
        padded = np.pad(x, ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))[
            :, :, ::stride, ::stride
        ]
        return np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True)

    def bn_relu(self, x, name):
        gamma, beta, mean, var = (
            self.weights[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        if self.training:
            mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
        mean, scale, beta = (v[:, None, None] for v in (mean, gamma / np.sqrt(var + 1e-5), beta))
        return np.maximum((x - mean) * scale + beta, 0)

    def block(self, x, name, stride):
        a = self.bn_relu(x, f"{name}.bn1")
        y = self.conv(self.bn_relu(self.conv(a, f"{name}.conv1", stride), f"{name}.bn2"), f"{name}.conv2")
        return y + (
            self.conv(a, f"{name}.convShortcut", stride)
            if f"{name}.convShortcut.weight" in self.weights
            else x
        )

    def network(self, x):
        stages = [self.conv(x, "conv1")]
        for group, stride in ((1, 1), (2, 2), (3, 2)):
            x = stages[-1]
            for i in range(self.blocks):
                x = self.block(x, f"block{group}.layer.{i}", stride if i == 0 else 1)
            stages.append(x)
        activated = [self.bn_relu(x, f"block{group}.layer.0.bn1") for group, x in zip((1, 2, 3), stages)]
        activated.append(self.bn_relu(stages[3], "bn1"))
        logits = activated[3].mean(axis=(2, 3)) @ self.weights["fc.weight"].T + self.weights["fc.bias"]
        return stages, activated, logits


def assert_close(ours, expected):
    """Compares with a tolerance of 1e-10 of the largest value.

    An inner product of n terms has an error of at most n·2^-53·Σ|terms|. With n <= 9·128 and five layers in a
    row, the error is 1e-12 of the largest value. Batch norm over few pixels can multiply this by
    1/sqrt(variance).
    """
    assert ours.shape == expected.shape
    assert np.abs(ours.detach().numpy() - expected).max() <= 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "width, name, stride",
    [
        pytest.param(1, "block1.layer.0", 1, id="identity-shortcut"),
        pytest.param(2, "block1.layer.0", 1, id="wider"),
        pytest.param(1, "block2.layer.0", 2, id="wider-at-half-resolution"),
    ],
)
def test_a_block_is_what_numpy_computes(width, name, stride, train):
    net = network(width=width, train=train)
    in_numpy, block = InNumpy(net), net.get_submodule(name)
    assert hasattr(block, "convShortcut") == (stride == 2 or width == 2)
    x = torch.randn(3, block.conv1.in_channels, 8, 8, dtype=torch.float64)
    summed, activated = block(x)
    assert_close(summed, in_numpy.block(x.numpy(), name, stride))
    assert_close(activated, in_numpy.bn_relu(x.numpy(), f"{name}.bn1"))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("depth, width", [(10, 1), (16, 2)])
def test_all_taps_and_the_logits_are_what_numpy_computes(depth, width, train):
    net, x = network(depth, width, train=train), images()
    stages, activated, logits = InNumpy(net).network(x.numpy())
    ours = net(x)
    for tensor, expected in zip(
        (*ours.stages, *ours.activated, ours.logits), (*stages, *activated, logits), strict=True
    ):
        assert_close(tensor, expected)


def test_activated_maps_are_what_the_batch_norms_that_follow_the_stages_give():
    net = network(16)
    ours = net(images())
    following = [net.block1.layer[0].bn1, net.block2.layer[0].bn1, net.block3.layer[0].bn1, net.bn1]
    for stage, activated, batch_norm in zip(ours.stages, ours.activated, following, strict=True):
        assert torch.equal(activated, batch_norm(stage).relu())


def test_taps_keep_the_values_they_had_when_they_were_made():
    net, seen = network(16, train=True), []
    for module in (net.conv1, net.block1, net.block2, net.block3):
        module.register_forward_hook(
            lambda _, inputs, output: seen.append(
                (output[0] if isinstance(output, tuple) else output).clone()
            )
        )
    assert all(torch.equal(stage, value) for stage, value in zip(net(images()).stages, seen, strict=True))


def test_every_batch_norm_runs_once_per_training_step():
    net = WideResNet(16, 2)
    net(torch.randn(2, 3, 8, 8))
    counts = {
        name: int(value) for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")
    }
    assert len(counts) == 13 and set(counts.values()) == {1}


def test_the_gradient_through_all_outputs_at_once_is_the_slope_of_their_sum():
    net = network(train=True)
    state = copy.deepcopy(net.state_dict())
    taken = net(images())
    weights = [torch.randn_like(t) for t in (*taken.stages, *taken.activated, taken.logits)]
    direction = [torch.randn_like(p) * 0.1 for p in net.parameters()]

    def total(step=0.0):
        net.load_state_dict(state)
        with torch.no_grad():
            for parameter, d in zip(net.parameters(), direction, strict=True):
                parameter += step * d
        taken = net(images())
        return sum(
            (t * w).sum()
            for t, w in zip((*taken.stages, *taken.activated, taken.logits), weights, strict=True)
        )

    gradients = torch.autograd.grad(total(), list(net.parameters()))
    assert all(g.abs().max() > 0 for g in gradients)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    with torch.no_grad():
        measured = (total(1e-6) - total(-1e-6)) / 2e-6
    # error of the central difference: rounding of 1e-16·|total|/1e-6, plus the few ReLUs that switch inside
    # the step, each with slope times 1e-6
    assert abs(measured - slope) <= 1e-4 * abs(slope)


# --- size, shapes, names


@pytest.mark.parametrize("depth, width, count", [(40, 2, 2_243_546), (16, 1, 175_066)])
def test_parameter_counts_are_the_published_ones(depth, width, count):
    assert sum(parameter.numel() for parameter in WideResNet(depth, width).parameters()) == count


@pytest.mark.parametrize("width, num_classes", [(1, 10), (2, 100)])
def test_taps_have_the_documented_shapes(width, num_classes):
    net = WideResNet(10, width, num_classes)
    ours = net(torch.randn(2, 3, 32, 32))
    shapes = [(2, 16, 32, 32), (2, 16 * width, 32, 32), (2, 32 * width, 16, 16), (2, 64 * width, 8, 8)]
    assert [t.shape for t in ours.stages] == [t.shape for t in ours.activated] == shapes
    assert ours.logits.shape == (2, num_classes)
    assert net.tap_channels == channels(width) == tuple(shape[1] for shape in shapes)


def test_channels_last_images_stay_channels_last_at_every_tap():
    net = WideResNet(10, 2).to(memory_format=torch.channels_last)
    ours = net(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (*ours.stages, *ours.activated))


@pytest.mark.parametrize(
    "depth, width, num_classes, phrase",
    [
        (4, 1, 10, "no Wide ResNet has depth 4: choose 6n"),
        (17, 1, 10, "no Wide ResNet has depth 17: choose 6n"),
        (-2, 1, 10, "no Wide ResNet has depth -2: choose 6n"),
        (16, 0, 10, "got 0 and 10"),
        (16, 1, 0, "got 1 and 0"),
    ],
)
def test_impossible_sizes_are_refused(depth, width, num_classes, phrase):
    with pytest.raises(InputError, match=phrase):
        WideResNet(depth, width, num_classes)


def test_state_dict_names_are_those_of_the_public_checkpoints():
    names = set(WideResNet(16, 1).state_dict())
    batch_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    block = {"conv1.weight", "conv2.weight", *(f"bn{i}.{part}" for i in (1, 2) for part in batch_norm)}
    assert names == {
        "conv1.weight",
        "fc.weight",
        "fc.bias",
        *(f"bn1.{part}" for part in batch_norm),
        *(f"block{group}.layer.{i}.{part}" for group in (1, 2, 3) for i in (0, 1) for part in block),
        "block2.layer.0.convShortcut.weight",
        "block3.layer.0.convShortcut.weight",  # group 1 keeps its 16 channels at width 1
    }


def test_convolutions_start_with_the_variance_of_he_et_al_over_fan_out():
    weight = WideResNet(16, 4).block3.layer[0].conv1.weight  # 128 -> 256 channels: fan-in is not fan-out
    # 128·256·9 draws: one standard deviation of the sample variance is sqrt(2/n) = 0.26 %
    assert weight.var().item() == pytest.approx(2 / (9 * 256), rel=0.01)


@pytest.mark.parametrize("depth, width", [(10, 1), (16, 2)])
def test_a_frozen_network_computes_the_same_from_folded_weights_and_its_original_stays(depth, width):
    net = network(depth, width)
    before = copy.deepcopy(net.state_dict())
    frozen_net = frozen(net, torch.float64)
    for mine, expected in zip(flat(frozen_net(images())), flat(net(images()))):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
    assert (
        sum(isinstance(module, nn.BatchNorm2d) for module in frozen_net.modules()) == (depth - 4) // 2 + 1
    ), "one of each block's two"
    assert not frozen_net.training and not any(
        parameter.requires_grad for parameter in frozen_net.parameters()
    )
    assert (
        all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        and net.fc.weight.requires_grad
    )


def test_a_frozen_network_holds_its_weights_in_the_compute_type_and_its_statistics_in_fp32():
    frozen_net = frozen(network().float().train(), torch.bfloat16)
    for name, tensor in frozen_net.state_dict().items():
        assert tensor.dtype == (
            torch.int64 if "num_batches" in name else torch.float32 if "bn" in name else torch.bfloat16
        ), name
    assert all(tensor.dtype == torch.bfloat16 for tensor in flat(frozen_net(images().bfloat16())))
    assert frozen_net.block1.layer[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_public_names_of_the_trained_teacher_fit_and_it_classifies_real_images(
    teacher_file, cifar10_test
):
    teacher = WideResNet(40, 2)
    teacher.load_state_dict(load_file(teacher_file), strict=True)
    teacher.eval().to(memory_format=torch.channels_last)
    teaching = frozen(teacher, torch.bfloat16)
    correct = torch.zeros(2)
    with torch.no_grad():
        for step, (images, labels) in zip(range(10), EvalLoader(cifar10_test, 100)):
            with torch.autocast("cpu", torch.bfloat16):
                logits = teacher(images).logits
            correct += torch.stack(
                [
                    (found.argmax(dim=1) == labels).sum()
                    for found in (logits, teaching(images.bfloat16()).logits)
                ]
            )
    assert correct[0] > 920 and correct[1] > 920  # of the first 1,000; 92.47 % of all 10,000
