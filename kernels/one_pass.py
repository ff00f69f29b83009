"""One-pass gradients: forward computes the gradient together with the loss, and backward only scales it.

A forward that will be differentiated writes the gradient of its first map as if the upstream gradient were 1.
Backward launches `rescale`, which reads the upstream gradient on the device and returns at once if it is 1:
no synchronisation, no traffic. Otherwise it reads and writes the gradient once more, so a known weight should
go into `factor`. (Under torch.compile, Inductor also copies the gradient before it is changed.)
In fp16 an unscaled gradient (about 5e-8) is below the smallest positive number, so backward reads the maps
again, with the upstream gradient at hand. So does a second backward: the first hands the gradient on.

PyTorch caches compiled backward passes on disk by operator name. An operator whose outputs or backward change
their meaning needs a new name, or an old cache gives wrong gradients without any message.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fastvid.kernels.triton_support import jit, launch, tl, triton
from torch import Tensor


def one_pass(gradient_of: Tensor) -> bool:
    """Whether forward writes the gradient of this tensor: not in fp16, nor under activation checkpointing,
    which installs hooks for saved tensors and must keep nothing between forward and backward."""
    # The only private function of PyTorch in this package; torch.utils.checkpoint calls it too. It exists in
    # torch 2.10 (the oldest supported version), was read in 2.14.1, and was tried in 2.14.1 and 2.15.0.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks
    wanted = torch.is_grad_enabled() and gradient_of.requires_grad and gradient_of.dtype != torch.float16
    return wanted and (torch.compiler.is_compiling() or hooks(True) is None)


@jit
def _rescale_kernel(
    gradient_ptr,  # [units · UNIT], scaled in place
    parameters_ptr,  # [parameters] fp32
    scaled_ptr,  # [parameters] fp32, every element written exactly once
    upstream_ptr,  # scalar fp32
    units,
    parameters,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,  # 16 if it divides the number of elements: all accesses are then 16 bytes wide
):
    """Each program strides over both arrays. The gradient is not touched if the upstream gradient is 1."""
    upstream = tl.load(upstream_ptr)
    for tile in range(tl.program_id(0), tl.cdiv(parameters, BLOCK), tl.num_programs(0)):
        offs_p = tile * BLOCK + tl.arange(0, BLOCK)
        mask = offs_p < parameters
        tl.store(scaled_ptr + offs_p, tl.load(parameters_ptr + offs_p, mask=mask) * upstream, mask=mask)
    if upstream != 1.0:
        elements = tl.cast(units, tl.int64) * UNIT
        for step in range(tl.program_id(0), tl.cdiv(elements, BLOCK), tl.num_programs(0)):
            offs_e = tl.cast(step, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            values = tl.load(gradient_ptr + offs_e, mask=offs_e < elements).to(tl.float32)
            tl.store(gradient_ptr + offs_e, values * upstream, mask=offs_e < elements)


@torch.library.custom_op("fastvid::rescale", mutates_args=("gradient",))
def rescale(gradient: Tensor, parameters: Tensor, upstream: Tensor) -> Tensor:
    """Multiply `gradient`, dense in memory, by `upstream` in place, and return parameters · upstream."""
    scaled = torch.empty_like(parameters)
    size, count = gradient.numel(), parameters.numel()
    # 512 programs of 128 threads: four on each multiprocessor. They start and end in a microsecond.
    programs = min(512, triton.cdiv(max(size, count, 1), 2048))
    unit = 1 if size % 16 else 16
    tensors, cut = (gradient, parameters, scaled, upstream), {"BLOCK": 2048, "UNIT": unit, "num_warps": 4}
    launch(_rescale_kernel, (programs,), *tensors, size // unit, count, **cut)
    return scaled


rescale.register_fake(lambda gradient, parameters, upstream: torch.empty_like(parameters))


def operator(name: str, arguments: str, function: Callable, backward: Callable, parameters=lambda *inputs: 0):
    """Register a pass over the inputs of a loss, and the loss's backward, as the operator fastvid::`name`.

    arguments: the schema of the inputs. Two inputs are added: with_gradient, and upstream, which is None in
    forward. Outputs: the loss (forward only), the gradient of the first input (if with_gradient), and the
    fp32 gradients of parameters(*inputs) numbers. They are allocated here, for torch.compile as well.
    """

    def outputs(*inputs) -> tuple[Tensor, Tensor, Tensor]:
        first, with_gradient, upstream = inputs[0], *inputs[-2:]
        shape = first.shape if with_gradient else (0,)  # a map keeps its strides; logits become contiguous
        gradient = torch.empty_like(first) if with_gradient and first.dim() == 4 else first.new_empty(shape)
        loss = first.new_empty(() if upstream is None else (0,), dtype=torch.float32)
        return loss, gradient, first.new_empty(parameters(*inputs), dtype=torch.float32)

    def run(*inputs) -> tuple[Tensor, Tensor, Tensor]:
        return function(*inputs, *outputs(*inputs))

    schema = f"({arguments}, bool with_gradient, Tensor? upstream) -> (Tensor, Tensor, Tensor)"
    registered = torch.library.custom_op(f"fastvid::{name}", run, mutates_args=(), schema=schema)
    registered.register_fake(outputs)
    registered.register_autograd(backward, setup_context=_save)
    return registered


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep for backward the inputs, the gradient that forward wrote, and the gradients of the parameters."""
    _, gradient, parameters = output
    ctx.mark_non_differentiable(gradient, parameters)
    ctx.set_materialize_grads(False)
    # Autograd refuses to save tensors from inference_mode, such as a teacher's map: they are kept here.
    kept = [value if isinstance(value, Tensor) and not value.is_inference() else None for value in inputs]
    ctx.inputs = [value if tensor is None else None for value, tensor in zip(inputs, kept)]
    ctx.save_for_backward(*kept, parameters)
    ctx.gradient = gradient if gradient.numel() else None


def begin_backward(op: str, ctx, upstream: Tensor) -> tuple[list, Tensor | None, Tensor]:
    """Return the inputs of forward, and times upstream the gradients of the first input and the parameters.
    The former is None if forward did not write it, or if an earlier backward has handed it on."""
    if torch.is_grad_enabled():  # in a backward this means create_graph=True
        raise RuntimeError(f"{op} has no second derivative in Triton: pass impl='reference'")
    *tensors, parameters = ctx.saved_tensors
    inputs = [value if tensor is None else tensor for value, tensor in zip(ctx.inputs, tensors)]
    gradient, ctx.gradient = ctx.gradient, None  # rescale changes it in place: for one backward only
    if gradient is None:
        return inputs, None, parameters * upstream
    return inputs, gradient, rescale(gradient, parameters, upstream)
