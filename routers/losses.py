"""Losses that shape a gate, one layer at a time.

T tokens (batch and sequence flattened, padding included), E experts, A active experts,
V vocabulary.

Every loss is a mean over the unmasked tokens of *one* layer. `total` is the number of tokens
that the mean is over: by default this mask's own; pass the tokens of the whole global batch
when the batch is spread over processes, and the sum of the processes' losses (and gradients)
is the loss of the global batch, however unevenly its tokens are spread.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from moiety.errors import InputError


def expert_counts(
    experts_TA: Tensor, mask_T: Tensor, experts: int, weights_TA: Tensor | None = None
) -> Tensor:
    """How many unmasked tokens each expert was chosen for -> fp32 count_E.

    With `weights_TA`, experts of weight 0 are not: a gate that takes as many as hold a share of
    the probability gives the rest that weight.
    """
    chosen_TA = mask_T.bool()[:, None].expand_as(experts_TA)
    if weights_TA is not None:
        chosen_TA = chosen_TA & (weights_TA > 0)
    return torch.bincount(experts_TA[chosen_TA], minlength=experts).float()


def load_shares(count_E: Tensor) -> Tensor:
    """Counts as shares that sum to 1; no tokens at all give the even load."""
    total = count_E.sum()
    even_E = torch.full_like(count_E, 1 / count_E.numel())
    return torch.where(total > 0, count_E / total.clamp(min=1), even_E)


def balance_loss(
    logits_TE: Tensor, mask_T: Tensor, load_E: Tensor, total: Tensor | int | None = None
) -> Tensor:
    """E · Σ_e f_e P_e: 1 for an even load, E for a collapse onto one expert.

    Switch Transformer (arXiv:2101.03961, eq. 4-6). f is `load_E`, a constant that sums to 1,
    best of the global or an accumulated batch: balance within a micro-batch suppresses domain
    specialisation (arXiv:2501.11873). P_e is the mean gate probability. Never pool layers
    before this product: two layers collapsed onto opposite halves would look balanced.
    """
    kept_TE = _kept(logits_TE, mask_T)
    mean_E = _mean(kept_TE.softmax(-1), total)
    return load_E.numel() * (load_E.detach() * mean_E).sum()


def z_loss(logits_TE: Tensor, mask_T: Tensor, total: Tensor | int | None = None) -> Tensor:
    """Mean of logsumexp(logits)²: keeps logits small (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return _mean(_kept(logits_TE, mask_T).logsumexp(-1).square(), total)


def domain_loss(
    logits_TE: Tensor, own_T: Tensor, mask_T: Tensor, total: Tensor | int | None = None
) -> Tensor:
    """Mean of -log softmax(logits)[own expert], in nats: routing as supervised classification.

    The gate is the posterior of the domain given the token, as that of DEMix
    (arXiv:2108.05036), here learned from the labels that the text has.
    """
    kept_TE = _kept(logits_TE, mask_T)
    return _mean(cross_entropy(kept_TE, own_T[mask_T.bool()], reduction="none"), total)


def regret_loss(
    logits_TE: Tensor, loss_TE: Tensor, mask_T: Tensor, total: Tensor | int | None = None
) -> Tensor:
    """Mean of Σ_e softmax(logits)_e · loss_e - min_e loss_e, in nats: 0 on the best expert.

    The expected loss of a gate that draws one expert a token, as in the gradient of an expected
    reward without the sampling (Williams 1992, REINFORCE). `loss_TE` is what each expert alone
    loses on the next token, a constant. Noise in it averages out over tokens, while a target of
    "the expert that did best on this token" would learn the noise.
    """
    kept_TE = _kept(logits_TE, mask_T)
    excess_TE = _kept(loss_TE.detach(), mask_T)
    excess_TE = excess_TE - excess_TE.amin(-1, keepdim=True)
    return _mean((kept_TE.softmax(-1) * excess_TE).sum(-1), total)


def distill_loss(
    logits_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, total: Tensor | int | None = None
) -> Tensor:
    """Mean KL divergence of the student's from the teacher's distribution, in nats.

    Hinton et al. 2015 (arXiv:1503.02531) at temperature 1; the teacher is a constant.
    """
    student_TV = _kept(logits_TV, mask_T).log_softmax(-1)
    teacher_TV = _kept(teacher_TV.detach(), mask_T).log_softmax(-1)
    return _mean(kl_div(student_TV, teacher_TV, reduction="none", log_target=True).sum(-1), total)


def _kept(logits_TE: Tensor, mask_T: Tensor) -> Tensor:
    if logits_TE.ndim != 2 or mask_T.shape != logits_TE.shape[:1]:
        raise InputError(
            "expected a row of values and one mask entry for each token, but the shapes are "
            f"{tuple(logits_TE.shape)} and {tuple(mask_T.shape)}"
        )
    return logits_TE[mask_T.bool()].float()


def _mean(values: Tensor, total: Tensor | int | None) -> Tensor:
    return values.sum(0) / (max(len(values), 1) if total is None else total)
