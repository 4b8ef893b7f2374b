"""Methods that only choose a mask and leave the kept weights as they are.

O out features, I in features.
"""

from torch import Tensor

from moiety.experts.pattern import Pattern


def magnitude(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest |w|; the calibration text is not used (Han et al. 2015, arXiv:1506.02626)."""
    return weight_OI * pattern.mask(weight_OI.abs())


def wanda(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> Tensor:
    """Keep the largest |w_ij|·‖x_j‖₂ (Sun et al. 2023, arXiv:2306.11695, equation 1)."""
    norm_I = gram_II.diagonal().clamp_min(0).sqrt()
    return weight_OI * pattern.mask(weight_OI.abs() * norm_I)
