"""The losses as equations in plain PyTorch: pure, any dtype, any device. Kernels are checked against them."""

import torch.nn.functional as F
from torch import Tensor


def vid_nll(mean: Tensor, target: Tensor, raw_scale: Tensor, *, eps: float = 1e-5) -> Tensor:
    """-log q(target | mean) of a Gaussian with one variance per channel, averaged, without ½·log 2π.

        1/(M·C) · Σ_c ½ [ S_c / v_c + M·log v_c ],  S_c = Σ_m (target - mean)²,  v = softplus(raw_scale) + eps

    mean, target: [B, C, H, W], M = B·H·W.  raw_scale: [C].  Source: Ahn et al., CVPR 2019.
    """
    rows = mean.numel() // mean.shape[1]
    squares = (target - mean).square().sum(dim=(0, 2, 3))
    variance = F.softplus(raw_scale) + eps
    return 0.5 * (squares / variance + rows * variance.log()).sum() / mean.numel()


def projected_vid_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    raw_scale: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """vid_nll of a 1x1 convolution: the mean is weight · hidden + bias at every position.

    hidden: [B, K, H, W].  weight: [C, K, 1, 1].  bias: [C] or None.  target: [B, C, H, W].  raw_scale: [C].
    """
    return vid_nll(F.conv2d(hidden, weight, bias), target, raw_scale, eps=eps)


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of (prediction - target)²; equal shapes."""
    return (prediction - target).square().mean()


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two attention maps, over images and positions.

        1/(B·H·W) · Σ (Q(student) - Q(teacher))²,   Q(x) = A / ‖A‖₂ over H·W,   A = mean over channels of x²

    student: [B, Cs, H, W].  teacher: [B, Ct, H, W].  Source: Zagoruyko and Komodakis, ICLR 2017, with the
    mean square and the squared norm of their code. A map of zeros stays zero.
    """
    student, teacher = (F.normalize(x.square().mean(dim=1).flatten(1), dim=1) for x in (student, teacher))
    return (student - teacher).square().mean()


def softened_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T² · KL(p_teacher ‖ p_student) at temperature T, summed over classes, averaged over the batch.

    student_logits, teacher_logits: [B, classes].  Source: Hinton et al. 2015.
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum() / student_logits.shape[0]
