"""What distillation minimises, window by window, so that it does not matter how they are split.

W windows, C context length, V vocabulary, D model width, L layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moiety.experts.recovery.settings import RecoverySettings

TINY = 1e-6


def distillation_loss(
    student: Any, teacher: Any, ids_WC: Tensor, mask_WC: Tensor, settings: RecoverySettings
) -> Tensor:
    """Sum over the windows of their loss times their predicted tokens, a scalar in nats.

    Divided by the predicted tokens of a step it is the loss of RecoverySettings. `student` and
    `teacher` are outputs of causal language models with logits (W, C, V) and, if `square_head`
    is positive, hidden states.
    """
    predicted_WC = mask_WC[:, 1:].bool()
    logits_WCV, soft_WCV = student.logits[:, :-1].float(), teacher.logits[:, :-1].float()
    loss_WC = logits_WCV.new_zeros(predicted_WC.shape)
    if settings.cross_entropy:
        nats = functional.cross_entropy(
            logits_WCV.flatten(0, 1), ids_WC[:, 1:].flatten(), reduction="none"
        )
        loss_WC = loss_WC + settings.cross_entropy * nats.view_as(loss_WC)
    if settings.kl:
        loss_WC = loss_WC + settings.kl * divergence(logits_WCV, soft_WCV, settings.temperature)
    loss = loss_WC.masked_select(predicted_WC).sum()
    if settings.square_head:
        error_W = square_head(student.hidden_states[1:], teacher.hidden_states[1:], mask_WC)
        loss = loss + settings.square_head * (error_W * predicted_WC.sum(1)).sum()
    return loss


def divergence(logits_WCV: Tensor, teacher_WCV: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of each token (W, C) times temperature², both softened by it.

    Hinton et al. 2015 (arXiv:1503.02531): the factor keeps gradients of one size.
    """
    log_student = (logits_WCV / temperature).log_softmax(-1)
    log_teacher = (teacher_WCV / temperature).log_softmax(-1)
    kl = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return kl.sum(-1) * temperature**2


def square_head(
    student_LWCD: Sequence[Tensor], teacher_LWCD: Sequence[Tensor], mask_WC: Tensor
) -> Tensor:
    """Squared error of the hidden states over their mean square, summed over layers, (W,).

    SquareHead (Kurtic et al. 2023, arXiv:2310.06927), each window by itself, padding left out.
    """
    kept_WC1 = mask_WC[..., None].float()
    total_W = torch.zeros(len(mask_WC), device=mask_WC.device)
    for student_WCD, teacher_WCD in zip(student_LWCD, teacher_LWCD, strict=True):
        teacher_WCD = teacher_WCD.float()
        entries_W = kept_WC1.sum((1, 2)) * teacher_WCD.shape[-1]
        error_W = ((student_WCD.float() - teacher_WCD).square() * kept_WC1).sum((1, 2)) / entries_W
        scale_W = (teacher_WCD.square() * kept_WC1).sum((1, 2)) / entries_W
        total_W = total_W + error_W / (scale_W + TINY)
    return total_W
