"""The sums that the losses take over whole maps, on a CPU: block by block, so that fp32 copies of 16-bit maps never leave the cache.

    squared_residuals = Σ_m (mean - target)², per channel          energy = mean over channels of x², per position

A plain expression writes each fp32 intermediate to memory, four times the bytes of a bf16 map, and allocates it anew. Here
forward and backward read the maps as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastvid.kernels import checks
from torch import Tensor

_BLOCK = 262144  # elements for each thread: 1 MB in fp32. Smaller ones pay more for the calls, larger ones leave the caches


def fits(*maps: Tensor) -> bool:
    """Whether blocks serve these maps: channels-last, on a CPU, single or half precision, and neither compiled nor transformed."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and all(
            x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and x.is_contiguous(memory_format=torch.channels_last)
            and not x.is_inference()
            and not checks.transformed(x)
            for x in maps
        )
    )


def squared_residuals(mean: Tensor, target: Tensor) -> Tensor:
    """Σ over B, H and W of (mean - target)²: [B, C, H, W] twice -> [C], fp32."""
    return _SquaredResiduals.apply(mean, target)


def energy(features: Tensor) -> Tensor:
    """Mean over channels of the squares: [B, C, H, W] -> [B, H·W], fp32."""
    return _Energy.apply(features)


class _SquaredResiduals(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(mean, target)
        sums = mean.new_zeros(mean.shape[1], dtype=torch.float32)
        for residual, scratch, _ in _residuals(mean, target):
            sums += torch.mul(residual, residual, out=scratch).sum(dim=0)
        return sums

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        mean, target = ctx.saved_tensors
        if torch.is_grad_enabled() or checks.transformed(
            upstream
        ):  # create_graph, or several upstream gradients at once
            gradient = 2 * upstream.view(-1, 1, 1) * (mean.float() - target.float())
            return gradient.to(mean.dtype), -gradient.to(target.dtype)
        gradients = [
            torch.empty_like(x) if needed else None for x, needed in zip((mean, target), ctx.needs_input_grad)
        ]
        for residual, scratch, rows in _residuals(mean, target):
            torch.mul(residual, 2 * upstream, out=scratch)
            if gradients[0] is not None:
                _rows(gradients[0])[rows] = scratch
            if gradients[1] is not None:
                _rows(gradients[1])[rows] = scratch.neg_()
        return tuple(gradients)


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        energies = features.new_empty(
            features.shape[0], features.shape[2] * features.shape[3], dtype=torch.float32
        )
        for values, scratch, rows in _blocks(features):
            torch.mean(torch.mul(values, values, out=scratch), dim=1, out=energies.view(-1)[rows])
        return energies

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        if torch.is_grad_enabled() or checks.transformed(upstream):
            slope = (2 / features.shape[1]) * upstream.view(features.shape[0], 1, *features.shape[2:])
            return (slope * features.float()).to(features.dtype)
        slope, gradient = upstream.reshape(-1, 1) * (2 / features.shape[1]), torch.empty_like(features)
        for values, scratch, rows in _blocks(features):
            _rows(gradient)[rows] = torch.mul(values, slope[rows], out=scratch)
        return gradient


def _rows(features: Tensor) -> Tensor:
    """A channels-last map as [M, C], without a copy."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _blocks(features: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Rows of the map in fp32, as much space for scratch, and which rows they are."""
    rows = _rows(features)
    size = max(1, _BLOCK * torch.get_num_threads() // rows.shape[1])
    values, scratch = rows.new_empty(2, min(size, len(rows)), rows.shape[1], dtype=torch.float32)
    for first in range(0, len(rows), size):
        count = min(size, len(rows) - first)
        yield values[:count].copy_(rows[first : first + count]), scratch[:count], slice(first, first + count)


def _residuals(mean: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Rows of mean - target in fp32, scratch space, and which rows they are."""
    targets = _rows(target)
    for values, scratch, rows in _blocks(mean):
        yield values.sub_(scratch.copy_(targets[rows])), scratch, rows
