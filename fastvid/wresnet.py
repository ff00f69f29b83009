"""Wide ResNets for 32x32 images, with the four feature maps that distillation uses (the taps).

Zagoruyko and Komodakis 2016, CIFAR form, pre-activation, no dropout. State-dict names are those of the
public checkpoints (WideResNet-pytorch, RepDistiller), so that these load directly.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastvid.config import TAPS as TAPS
from fastvid.errors import InputError


class Activations(NamedTuple):
    """The output of a forward pass.

    stages: the residual sums after the stem and groups 1, 2, 3, for width k:
        [B, 16, 32, 32], [B, 16k, 32, 32], [B, 32k, 16, 16], [B, 64k, 8, 8].
    activated: the same four maps after the batch norm and ReLU that follow in the network.
    logits: [B, classes].
    """

    stages: tuple[Tensor, Tensor, Tensor, Tensor]
    activated: tuple[Tensor, Tensor, Tensor, Tensor]
    logits: Tensor


def channels(width: int) -> tuple[int, int, int, int]:
    """Channels of the four taps of a network of this width."""
    return 16, 16 * width, 32 * width, 64 * width


class WideResNet(nn.Module):
    """WRN-depth-width: `WideResNet(16, 1)(images)` -> Activations.

    depth: 6n + 4 with n >= 1.  width: 1 or more.
    images: [B, 3, H, W], normalised; H = W = 32 gives the shapes in Activations.
    Raises InputError for another depth or width.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"no Wide ResNet has depth {depth}: choose 6n + 4, such as 10, 16, 22, 28 or 40")
        if width < 1 or num_classes < 1:
            raise InputError(f"width and num_classes must be 1 or more, got {width} and {num_classes}")
        self.depth, self.width, self.num_classes = depth, width, num_classes
        stem, *groups = self.tap_channels = channels(width)
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.block1 = _Group(blocks, stem, groups[0], stride=1)
        self.block2 = _Group(blocks, groups[0], groups[1], stride=2)
        self.block3 = _Group(blocks, groups[1], groups[2], stride=2)
        self.bn1 = nn.BatchNorm2d(groups[2])
        self.fc = nn.Linear(groups[2], num_classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Activations:
        stem = self.conv1(images)
        group1, stem_activated = self.block1(stem)
        group2, group1_activated = self.block2(group1)
        group3, group2_activated = self.block3(group2)
        group3_activated = F.relu(self.bn1(group3), inplace=True)
        # avg_pool2d, because the gradient of mean() is NCHW
        logits = self.fc(F.avg_pool2d(group3_activated, group3_activated.shape[-2:]).flatten(1))
        activated = (stem_activated, group1_activated, group2_activated, group3_activated)
        return Activations((stem, group1, group2, group3), activated, logits)


def frozen(network: WideResNet, dtype: torch.dtype) -> WideResNet:
    """A copy of `network` for inference: eval mode, no gradients, channels-last. Equal up to rounding.

    dtype: of the convolutions and linear layers, and therefore of the maps. Each batch norm that follows a
    convolution is folded into that convolution. The other batch norms stay in fp32: their statistics need it.
    """
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    for group in (copied.block1, copied.block2, copied.block3):
        for block in group.layer:
            block.conv1, block.bn2 = fuse_conv_bn_eval(block.conv1, block.bn2), nn.Identity()
    for module in copied.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return copied.to(memory_format=torch.channels_last)


class _Group(nn.Module):
    """Blocks of one resolution. Returns the residual sum, and the input after the first batch norm + ReLU."""

    def __init__(self, blocks: int, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        first = _Block(in_channels, out_channels, stride)
        others = (_Block(out_channels, out_channels, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, *others = self.layer
        x, activated = first(x)
        for block in others:
            x, _ = block(x)
        return x, activated


class _Block(nn.Module):
    """With a = ReLU(BN1(x)), returns Conv2(ReLU(BN2(Conv1(a)))) + shortcut, and a.

    The shortcut is a 1x1 convolution of a if the number of channels changes, else x. The ReLUs work in place,
    on outputs of a batch norm only.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        activated = F.relu(self.bn1(x), inplace=True)
        y = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        shortcut = self.convShortcut(activated) if hasattr(self, "convShortcut") else x
        return y + shortcut, activated


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
