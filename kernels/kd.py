"""Knowledge distillation: the divergence of two softened class distributions.

    loss = T²/B · Σ_b Σ_k p_teacher · (log p_teacher - log p_student),   p = softmax(logits / T)
"""
from fastvid.kernels import checks, reference
from torch import Tensor


def softened_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0, impl: str = "auto") -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, summed over classes, averaged over the batch.

    student_logits, teacher_logits: [B, classes], any floating dtype.  temperature: more than 0.
    Returns a scalar, fp32 (fp64 for fp64 input).  impl: auto or reference.
    Raises ValueError on shapes or a temperature that do not fit.  Source: Hinton et al. 2015.
    """
    checks.choose("softened_kl", impl)
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError("softened_kl wants two equal shapes [B, classes], but `student_logits` is "
                         f"{checks.describe(student_logits)} and `teacher_logits` is {checks.describe(teacher_logits)}")
    if not temperature > 0:
        raise ValueError(f"softened_kl wants a temperature of more than 0, got {temperature}")
    return reference.softened_kl(*checks.upcast(student_logits, teacher_logits), temperature=temperature)
