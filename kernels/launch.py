"""What every Triton launch shares: Triton where it is installed, one-pass gradients, and their scaling in backward.

One pass: a forward that is going to be differentiated writes the gradient of its first map together with the loss, as if the
upstream gradient were 1. Backward then launches `rescale`, which reads the upstream gradient on the device and returns at once
when it is 1: no synchronisation, and no further traffic unless the caller multiplied the loss (or torch.compile runs, whose Inductor
copies the gradient first, seen on a CPU). What is known to multiply it (a transfer weight) belongs into `factor`.
Otherwise rescale reads and writes the gradient once more: 2·elements·itemsize bytes.
In fp16 an unscaled gradient (about 5e-8) lies below the smallest number, so there the forward writes none, and backward reads the
maps again with the upstream gradient at hand; so does a second backward through the same loss, and therefore the maps are kept.

PyTorch keeps compiled backward passes on disk and finds them by the names of the operators. So an operator whose outputs or backward
change their meaning between two versions of this package takes a new name, or old caches give wrong gradients without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except (
    ImportError
):  # macOS and Windows have none: everything imports, the references run, and checks.choose says the rest
    triton = tl = None

OPTIONS = {"enable_fp_fusion": True}
"""Of every launch: the compiler's default changes with Triton 3.10, and the bits of a result should not."""
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set before the first import: the kernels then run on CPU tensors, slowly, as tests do."""


def jit(function: Callable) -> Callable:
    """triton.jit that specialises pointers and constants only: one binary serves all batch sizes, the last short one included."""
    if triton is None:
        return function
    scalars = [
        name
        for name in inspect.signature(function).parameters
        if name.islower() and not name.endswith("_ptr")
    ]
    return triton.jit(function, do_not_specialize=scalars)


def one_pass(gradient_of: Tensor) -> bool:
    """Whether forward shall write the gradient of this tensor. Not under activation checkpointing, which keeps nothing until backward."""
    return (
        torch.is_grad_enabled()
        and gradient_of.requires_grad
        and gradient_of.dtype != torch.float16
        and (
            torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        )
    )


def dense(parameter: Tensor | None) -> Tensor | None:
    """A parameter as the kernels read it. Maps are refused instead (checks.channels_last): this copies a few kilobytes at most."""
    return None if parameter is None else parameter.contiguous()


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def power_of_two(number: int, *, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    return 1 << (max(number, least) - 1).bit_length()


@jit
def _rescale_kernel(
    gradient_ptr,  # [units · UNIT], scaled in place
    parameters_ptr,  # [parameters] fp32
    scaled_ptr,  # [parameters] fp32, every element written exactly once
    upstream_ptr,  # scalar fp32
    units,
    parameters,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,  # elements come in units: where 16 divides them, accesses are wide up to the end
):
    """Each program strides over both arrays. Where the upstream gradient is 1, the large one is not touched."""
    upstream = tl.load(upstream_ptr)
    for tile in range(tl.program_id(0), tl.cdiv(parameters, BLOCK), tl.num_programs(0)):
        offs = tile * BLOCK + tl.arange(0, BLOCK)
        tl.store(
            scaled_ptr + offs,
            tl.load(parameters_ptr + offs, mask=offs < parameters) * upstream,
            mask=offs < parameters,
        )
    if upstream != 1.0:
        elements = tl.cast(units, tl.int64) * UNIT
        for step in range(tl.program_id(0), tl.cdiv(elements, BLOCK), tl.num_programs(0)):
            offs_e = tl.cast(step, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            values = tl.load(gradient_ptr + offs_e, mask=offs_e < elements).to(tl.float32)
            tl.store(gradient_ptr + offs_e, values * upstream, mask=offs_e < elements)


@torch.library.custom_op("fastvid::rescale", mutates_args=("gradient",))
def rescale(gradient: Tensor, parameters: Tensor, upstream: Tensor) -> Tensor:
    """Multiplies `gradient`, dense in memory, by the scalar `upstream` in place, and returns parameters · upstream."""
    scaled = torch.empty_like(parameters)
    # 512 programs of 128 threads: four on each multiprocessor, and few enough to start and end in a microsecond.
    programs = min(512, cdiv(max(gradient.numel(), parameters.numel(), 1), 2048))
    unit = 1 if gradient.numel() % 16 else 16
    with torch.cuda.device_of(gradient):
        _rescale_kernel[(programs,)](
            gradient,
            parameters,
            scaled,
            upstream,
            gradient.numel() // unit,
            parameters.numel(),
            BLOCK=2048,
            UNIT=unit,
            num_warps=4,
            **OPTIONS,
        )
    return scaled


@rescale.register_fake
def _(gradient, parameters, upstream):
    return torch.empty_like(parameters)


def save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """setup_context of every loss whose output is (loss, gradient of the first map or nothing, fp32 gradients of parameters)."""
    _, gradient, parameters = output
    ctx.mark_non_differentiable(gradient, parameters)
    ctx.set_materialize_grads(False)
    kept = [value if isinstance(value, Tensor) and not value.is_inference() else None for value in inputs]
    # A teacher's map may come from inference_mode, and autograd refuses to keep such tensors.
    ctx.inputs = [value if tensor is None else None for value, tensor in zip(inputs, kept)]
    ctx.save_for_backward(*kept, parameters)
    ctx.gradient = (
        gradient if gradient.numel() else None
    )  # handed on by the first backward, which scales it in place


def saved(ctx) -> tuple[list, Tensor]:
    """The inputs of forward, and the gradients of its parameters."""
    *tensors, parameters = ctx.saved_tensors
    return [value if tensor is None else tensor for value, tensor in zip(ctx.inputs, tensors)], parameters


def batched(tensor: Tensor) -> bool:
    """Whether the tensor stands for several: in torch.func transforms, and in autograd's is_grads_batched."""
    return torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
    ) or torch._C._functorch.is_legacy_batchedtensor(tensor)


def first_derivative_only(op: str, upstream: Tensor) -> None:
    if torch.is_grad_enabled():  # in a backward: create_graph
        raise RuntimeError(
            f"{op} has no second derivative in Triton: call it with impl='reference' under create_graph=True"
        )
    if batched(upstream):
        raise RuntimeError(
            f"{op} takes one upstream gradient at a time in Triton: pass impl='reference' under is_grads_batched=True"
        )


def scale(ctx, upstream: Tensor, parameters: Tensor) -> tuple[Tensor | None, Tensor]:
    """The gradient that forward wrote, if it did and none has taken it, and those of the parameters, times `upstream`."""
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        return None, parameters * upstream
    return gradient, rescale(gradient, parameters, upstream)
