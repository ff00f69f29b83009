"""Knowledge distillation: the divergence of two softened class distributions, fused. p = softmax(logits / T).

    loss = factor·T²/B · Σ_b KL_b,  KL_b = Σ_k p_teacher · (log p_teacher - log p_student)
    ∂loss/∂student = factor·T/B · (p_student - p_teacher)
    ∂loss/∂teacher = factor·T/B · p_teacher · (log p_teacher - log p_student - KL_b)

One pass reads both logits [B, K] and writes the gradient: 3·B·K·itemsize bytes, or 2 without a gradient. At
128 x 10 only launches count: two, not about twenty. A gradient of the teacher's logits is one more pass.
"""

from __future__ import annotations

from fastvid.kernels import checks, reference
from fastvid.kernels.one_pass import begin_backward, one_pass, operator
from fastvid.kernels.triton_support import jit, launch, tl, triton
from torch import Tensor

_MOST_CLASSES = 32768  # a row stays in the registers of one program
_TILE = 2048  # logits in one program, unless a row is longer: one launch does 128 images of 10 classes


@jit
def _log_softmax(logits, mask, temperature):
    """The log softmax of rows / temperature. The largest logit is subtracted first, while that is exact."""
    logits = tl.where(mask, logits.to(tl.float32), float("-inf"))
    logits = tl.div_rn(logits - tl.max(logits, axis=1)[:, None], temperature)
    return logits - tl.log(tl.sum(tl.where(mask, tl.exp(logits), 0.0), axis=1))[:, None]


@jit
def _softened_kl_kernel(
    student_ptr,  # [B, K], rows `student_stride` apart
    teacher_ptr,  # [B, K], rows `teacher_stride` apart
    upstream_ptr,  # scalar fp32, or None: 1
    loss_ptr,  # [programs] fp32, the share of each program; or None
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
    """One program does BLOCK_ROWS images. The gradient is the student's, or with OF_TEACHER the teacher's."""
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


def _pass(logits, other, temperature, factor, of_teacher, with_gradient, upstream, loss, gradient, nothing):
    """`logits` are the student's, whose gradient is usually wanted, and `other` the teacher's; or vice
    versa."""
    student, teacher = (other, logits) if of_teacher else (logits, other)
    images, classes = student.shape
    block_classes = triton.next_power_of_2(classes)
    block_rows = max(1, _TILE // block_classes)
    programs = triton.cdiv(images, block_rows)
    shares = nothing.new_empty(programs) if upstream is None else None
    if student.numel():
        tensors = (student, teacher, upstream, shares, gradient if with_gradient else None)
        numbers = (images, student.stride(0), teacher.stride(0), temperature, factor / images)
        cut = {"CLASSES": classes, "BLOCK_ROWS": block_rows, "BLOCK_CLASSES": block_classes}
        cut |= {"OF_TEACHER": of_teacher, "num_warps": min(16, max(4, block_classes // 512))}
        launch(_softened_kl_kernel, (programs,), *tensors, *numbers, **cut)
    if upstream is None and not student.numel():
        loss.fill_(float("nan"))  # the mean of nothing
    elif upstream is None:
        loss = shares.sum() if programs > 1 else shares.view(())
    return loss, gradient, nothing


def _backward(ctx, upstream, *_):
    (student, teacher, *numbers, _, _, _), gradient, _ = begin_backward("softened_kl", ctx, upstream)
    teacher_gradient = None
    if gradient is None and ctx.needs_input_grad[0]:
        gradient = _softened_kl(student, teacher, *numbers, False, True, upstream)[1]
    if ctx.needs_input_grad[1]:
        teacher_gradient = _softened_kl(teacher, student, *numbers, True, True, upstream)[1]
    return gradient, teacher_gradient, None, None, None, None, None


_SCHEMA = "Tensor logits, Tensor other, float temperature, float factor, bool of_teacher"
_softened_kl = operator("softened_kl_pass", _SCHEMA, _pass, _backward)


def softened_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    factor: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, summed over classes, averaged over the batch.

    student_logits, teacher_logits: [B, classes], any floating dtype.  temperature: positive.
    factor, impl, errors: as in vid_nll. Triton needs at most 32,768 classes, side by side in memory.
    Returns a scalar, fp32 (fp64 for fp64 input).  Source: Hinton et al. 2015.
    """
    op, logits = "softened_kl", {"student_logits": student_logits, "teacher_logits": teacher_logits}
    checks.logits(op, **logits)
    checks.numbers(op, temperature=temperature, factor=factor)
    if not temperature > 0:
        raise ValueError(f"softened_kl wants a temperature of more than 0, got {temperature}")
    if checks.choose(op, impl, logits) == "triton":
        if (classes := student_logits.shape[1]) > _MOST_CLASSES:
            limit = f"{op} has Triton kernels for up to {_MOST_CLASSES} classes"
            raise ValueError(f"{limit}, not {classes}: pass impl='reference'")
        inputs = (*logits.values(), temperature, factor, False)
        return _softened_kl(*inputs, one_pass(student_logits), None)[0]
    return factor * reference.softened_kl(*checks.upcast(*logits.values()), temperature=temperature)
