"""Methods that only choose a mask and leave the kept weights as they are.

O out features, I in features. A density compares the scores that its paper compares: Wanda
those of one row, the others those of the whole matrix.
"""

import torch
from torch import Tensor

from moiety.experts.methods.problem import check_finite, check_problem
from moiety.experts.pattern import Pattern


def magnitude(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest |w|; the calibration text is not used (Han et al. 2015, arXiv:1506.02626)."""
    check_problem(weight_OI, gram_II)
    return weight_OI * pattern.mask(weight_OI.abs(), within="matrix")


def wanda(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest |w_ij|·‖x_j‖₂ (Sun et al. 2023, arXiv:2306.11695, equation 1)."""
    check_problem(weight_OI, gram_II)
    return weight_OI * pattern.mask(wanda_score(weight_OI, gram_II), within="row")


def ria(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest share of row and column, times ‖x_j‖₂^½.

    `(|w_ij| / Σ_i |w_ij| + |w_ij| / Σ_j |w_ij|) · ‖x_j‖₂^½`, relative importance and activations
    (Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", ICLR). A weight that is small beside others stays if its row or its column
    would otherwise lose everything.
    """
    check_problem(weight_OI, gram_II)
    norm_I = _input_norm(gram_II)
    size_OI = weight_OI.abs()
    tiny = torch.finfo(size_OI.dtype).tiny
    score_OI = size_OI / size_OI.sum(0).clamp_min(tiny)
    score_OI += size_OI / size_OI.sum(1, keepdim=True).clamp_min(tiny)
    score_OI *= norm_I.sqrt()
    return weight_OI * pattern.mask(score_OI, within="matrix")


def wanda_score(weight_OI: Tensor, gram_II: Tensor) -> Tensor:
    """`|w_ij|·‖x_j‖₂` of every weight (O, I); raises InputError for NaN activations."""
    return weight_OI.abs() * _input_norm(gram_II)


def _input_norm(gram_II: Tensor) -> Tensor:
    check_finite(gram_II)
    return gram_II.diagonal().clamp_min(0).sqrt()
