"""ALPS: choose mask and values together by splitting them (ADMM); slower and better.

O out features, I in features.
"""

import torch
from torch import Tensor

from moiety.experts.methods.problem import check_finite, check_problem
from moiety.experts.methods.refit import refit
from moiety.experts.pattern import Pattern

DAMPING = 0.01
PENALTY = 0.03
PENALTY_EVERY = 3
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
SETTLED_AFTER = 30
SETTLED_CHANGE = 3e-4
MOST_STEPS = 300
CHUNK_ELEMENTS = 1 << 19


def alps(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> Tensor:
    """Prune by alternating between the best values and the best mask, then refit.

    Meng et al. 2024, arXiv:2406.07831, algorithm 1: with inputs scaled to unit norm, B minimises
    the output error plus a penalty on its distance from D, D is B (plus the dual) projected to
    the pattern, and the penalty grows every third step by 1.3, 1.2 or 1.1, the faster the more
    of the mask changed. Stops after 30 steps or more, once less than 0.03 % of the mask changed in
    three. A density is projected over the whole matrix.

    Ours differ: damping is 0.01 of each input's own diagonal instead of the mean one, so that
    outlier channels do not drown the rest; the penalty starts at 0.03 instead of 0.1; and each
    penalty's inverse comes from a Cholesky factor instead of one eigendecomposition, which
    here costs as much as a dozen of those. Raises InputError as `refit` does.
    """
    check_problem(weight_OI, gram_II)
    check_finite(gram_II)
    pattern.check_width(weight_OI.shape[1])
    if pattern.is_dense:
        return weight_OI.clone()
    scaled_II, scale_I = _scaled(gram_II)
    value_OI = _alternate(weight_OI * scale_I, scaled_II, pattern).div_(scale_I)
    value_OI[:, gram_II.diagonal() <= 0] = 0
    return refit(weight_OI, value_OI, gram_II)


def _scaled(gram_II: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix of inputs scaled to unit norm, damped, and their norms (I,)."""
    diagonal_I = gram_II.diagonal()
    scale_I = torch.where(diagonal_I > 0, diagonal_I, 1).sqrt()
    scaled_II = gram_II / scale_I
    scaled_II /= scale_I[:, None]
    scaled_II.diagonal().fill_(1 + DAMPING)
    return scaled_II, scale_I


def _alternate(target_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> Tensor:
    """The algorithm's main loop in scaled coordinates; the sum of D and the scaled dual is kept.

    Where the mask is true that sum is D and the dual is zero, elsewhere the other way round.
    """
    penalty = PENALTY
    pull_OI = target_OI @ gram_II
    inverse_II = _inverse(gram_II, penalty)
    mask_OI = _mask(target_OI, pattern)
    sum_OI = target_OI * mask_OI
    stable_OI = mask_OI
    for step in range(1, MOST_STEPS + 1):
        dual_OI = sum_OI.masked_fill(mask_OI, 0)
        kept_OI = sum_OI.sub_(dual_OI)
        right_OI = torch.add(pull_OI, kept_OI.sub_(dual_OI), alpha=penalty)
        sum_OI = torch.addmm(dual_OI, right_OI, inverse_II)
        mask_OI = _mask(sum_OI, pattern)
        if step % PENALTY_EVERY:
            continue
        changed = int((mask_OI != stable_OI).sum()) / max(1, int(mask_OI.sum()))
        stable_OI = mask_OI
        if step >= SETTLED_AFTER and changed < SETTLED_CHANGE:
            break
        growth = next(factor for least, factor in GROWTH if changed >= least)
        sum_OI = torch.where(mask_OI, sum_OI, sum_OI / growth)
        penalty *= growth
        inverse_II = _inverse(gram_II, penalty)
    return sum_OI.mul_(mask_OI)


def _inverse(gram_II: Tensor, penalty: float) -> Tensor:
    shifted_II = gram_II.clone()
    shifted_II.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted_II))


def _mask(value_OI: Tensor, pattern: Pattern) -> Tensor:
    """The pattern's mask of the largest entries, row chunk by row chunk where rows are apart."""
    rows = max(1, CHUNK_ELEMENTS // value_OI.shape[1]) if pattern.group else len(value_OI)
    masks = [pattern.mask(chunk_OI.abs(), within="matrix") for chunk_OI in value_OI.split(rows)]
    return torch.cat(masks)
