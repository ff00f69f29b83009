"""Knowledge distillation: the divergence of two softened class distributions, fused.

    loss = factor·T²/B · Σ_b KL_b,   KL_b = Σ_k p_teacher · (log p_teacher - log p_student),   p = softmax(logits / T)
    ∂loss/∂student = factor·T/B · (p_student - p_teacher)
    ∂loss/∂teacher = factor·T/B · p_teacher · (log p_teacher - log p_student - KL_b)

K classes. One pass reads both logits and writes the gradient: 3·B·K·itemsize bytes. At 128 x 10 that is nothing: it is the number
of launches that counts, two instead of about twenty. Without a gradient: 2·B·K. A gradient of the teacher's logits is a pass of its own.
"""

from __future__ import annotations

import torch
from fastvid.kernels import checks, reference
from fastvid.kernels.launch import (
    OPTIONS,
    cdiv,
    first_derivative_only,
    jit,
    one_pass,
    power_of_two,
    save,
    saved,
    scale,
    tl,
)
from torch import Tensor

_MOST_CLASSES = 32768  # a row is kept in the registers of one program
_TILE = 2048  # logits of one program, unless a row is longer: 128 images of 10 classes, so that one launch does it all


@jit
def _log_softmax(logits, mask, temperature):
    """Of rows [BLOCK_ROWS, BLOCK_CLASSES] / temperature. The largest is subtracted first, while that is exact."""
    logits = tl.where(mask, logits.to(tl.float32), float("-inf"))
    logits = tl.div_rn(logits - tl.max(logits, axis=1)[:, None], temperature)
    return logits - tl.log(tl.sum(tl.where(mask, tl.exp(logits), 0.0), axis=1))[:, None]


@jit
def _softened_kl_kernel(
    student_ptr,  # [B, K], rows `student_stride` apart
    teacher_ptr,  # [B, K], rows `teacher_stride` apart
    upstream_ptr,  # scalar fp32, or None: 1
    loss_ptr,  # [programs] fp32, each program's share of the loss; or None
    gradient_ptr,  # [B, K] dense, every element written exactly once; or None
    images,
    student_stride,
    teacher_stride,
    temperature,
    inverse_images,
    CLASSES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    OF_TEACHER: tl.constexpr,
):
    """One program does BLOCK_ROWS images; the gradient is the student's, or with OF_TEACHER the teacher's."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_k = tl.arange(0, BLOCK_CLASSES)
    mask = (offs_b < images)[:, None] & (offs_k < CLASSES)[None, :]
    columns = (offs_k < CLASSES)[None, :] & (offs_b >= 0)[:, None]
    student = tl.load(student_ptr + offs_b[:, None] * student_stride + offs_k[None, :], mask=mask, other=0.0)
    teacher = tl.load(teacher_ptr + offs_b[:, None] * teacher_stride + offs_k[None, :], mask=mask, other=0.0)
    student = _log_softmax(student, columns, temperature)
    teacher = _log_softmax(teacher, columns, temperature)
    probability = tl.exp(teacher)
    terms = tl.where(mask, probability * (teacher - student), 0.0)
    if loss_ptr is not None:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(terms) * (temperature * temperature * inverse_images))
    if gradient_ptr is not None:
        slope = temperature * inverse_images
        if upstream_ptr is not None:
            slope *= tl.load(upstream_ptr)
        if OF_TEACHER:
            gradient = terms - probability * tl.sum(terms, axis=1)[:, None]
        else:
            gradient = tl.exp(student) - probability
        tl.store(gradient_ptr + offs_b[:, None] * CLASSES + offs_k[None, :], slope * gradient, mask=mask)


def _launch(student, teacher, upstream, temperature, factor, *, with_loss, with_gradient, of_teacher=False):
    """Each program's share of the loss, and the gradient of one of the logits; None for what was not asked."""
    images, classes = student.shape
    block_classes = power_of_two(classes)
    block_rows = max(1, _TILE // block_classes)
    programs = cdiv(images, block_rows)
    loss = torch.empty(programs, dtype=torch.float32, device=student.device) if with_loss else None
    wanted = teacher if of_teacher else student
    gradient = torch.empty(wanted.shape, dtype=wanted.dtype, device=wanted.device) if with_gradient else None
    if student.numel():
        with torch.cuda.device_of(student):
            _softened_kl_kernel[(programs,)](
                student,
                teacher,
                upstream,
                loss,
                gradient,
                images,
                student.stride(0),
                teacher.stride(0),
                temperature,
                factor / images,
                CLASSES=classes,
                BLOCK_ROWS=block_rows,
                BLOCK_CLASSES=block_classes,
                OF_TEACHER=of_teacher,
                num_warps=min(16, max(4, block_classes // 512)),
                **OPTIONS,
            )
    return loss, gradient


@torch.library.custom_op("fastvid::softened_kl", mutates_args=())
def _softened_kl(
    student: Tensor, teacher: Tensor, temperature: float, factor: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss, gradient = _launch(
        student, teacher, None, temperature, factor, with_loss=True, with_gradient=with_gradient
    )
    if not student.numel():
        total = loss.new_full((), float("nan"))  # the mean of nothing
    else:
        total = loss.sum() if len(loss) > 1 else loss.view(())
    return total, student.new_empty(0) if gradient is None else gradient, loss.new_empty(0)


@_softened_kl.register_fake
def _(student, teacher, temperature, factor, with_gradient):
    gradient = student.new_empty(student.shape) if with_gradient else student.new_empty(0)
    return student.new_empty((), dtype=torch.float32), gradient, student.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("fastvid::softened_kl_gradient", mutates_args=())
def _softened_kl_gradient(
    upstream: Tensor, student: Tensor, teacher: Tensor, temperature: float, factor: float, of_teacher: bool
) -> Tensor:
    return _launch(
        student,
        teacher,
        upstream,
        temperature,
        factor,
        with_loss=False,
        with_gradient=True,
        of_teacher=of_teacher,
    )[1]


@_softened_kl_gradient.register_fake
def _(upstream, student, teacher, temperature, factor, of_teacher):
    return torch.empty(student.shape, dtype=(teacher if of_teacher else student).dtype, device=student.device)


def _backward(ctx, upstream, *_):
    (student, teacher, temperature, factor, _), nothing = saved(ctx)
    first_derivative_only("softened_kl", upstream)
    student_gradient, teacher_gradient = scale(ctx, upstream, nothing)[0], None
    if student_gradient is None and ctx.needs_input_grad[0]:
        student_gradient = _softened_kl_gradient(upstream, student, teacher, temperature, factor, False)
    if ctx.needs_input_grad[1]:
        teacher_gradient = _softened_kl_gradient(upstream, student, teacher, temperature, factor, True)
    return student_gradient, teacher_gradient, None, None, None


_softened_kl.register_autograd(_backward, setup_context=save)


def softened_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    factor: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, summed over classes, averaged over the batch.

    student_logits, teacher_logits: [B, classes], any floating dtype.  temperature: more than 0.
    factor: multiplies the loss; on a GPU better here than outside, because backward then need not touch the logits again.
    Returns a scalar, fp32 (fp64 for fp64 input).  impl: auto (Triton for CUDA tensors, else the reference), triton or reference.
    Triton wants fp32, bf16 or fp16, at most 32,768 classes that lie side by side, and has first derivatives only.
    Raises ValueError on shapes, dtypes, layouts or a temperature that do not fit.  Source: Hinton et al. 2015.
    """
    checks.logits("softened_kl", student_logits=student_logits, teacher_logits=teacher_logits)
    checks.numbers("softened_kl", temperature=temperature, factor=factor)
    if not temperature > 0:
        raise ValueError(f"softened_kl wants a temperature of more than 0, got {temperature}")
    if (
        checks.choose("softened_kl", impl, student_logits=student_logits, teacher_logits=teacher_logits)
        == "triton"
    ):
        checks.rows(
            "softened_kl", _MOST_CLASSES, student_logits=student_logits, teacher_logits=teacher_logits
        )
        return _softened_kl(student_logits, teacher_logits, temperature, factor, one_pass(student_logits))[0]
    return factor * reference.softened_kl(
        *checks.upcast(student_logits, teacher_logits), temperature=temperature
    )
