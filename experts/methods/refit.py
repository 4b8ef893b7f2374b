"""Masked least-squares refit: the best values for a given mask, by conjugate gradients.

O out features, I in features.
"""

import torch
from torch import Tensor


def refit(
    weight_OI: Tensor,
    pruned_OI: Tensor,
    gram_II: Tensor,
    steps: int = 20,
    damping: float = 1e-6,
) -> Tensor:
    """Move the kept values of `pruned_OI` to minimise `tr((W-P) G (W-P)ᵀ)`, zeros staying zero.

    All rows at once, preconditioned by the diagonal of G; the mask is where `pruned_OI` is not
    zero. Each step costs one O x I x I product. The result is never worse than the input on the
    Gram matrix: a row whose error would rise keeps its old values. Follows the masked conjugate
    gradients of ALPS (Meng et al. 2024, arXiv:2406.07831, algorithm 2), applied to any mask.
    """
    mask_OI = pruned_OI != 0
    curvature_II = gram_II.clone()
    diagonal_I = curvature_II.diagonal()
    diagonal_I.add_(damping * diagonal_I.mean())
    scale_I = torch.where(diagonal_I > 0, diagonal_I.reciprocal(), 0)
    value_OI = pruned_OI.clone()
    residual_OI = ((weight_OI - value_OI) @ curvature_II) * mask_OI
    direction_OI = residual_OI * scale_I
    energy_O1 = (residual_OI * direction_OI).sum(1, keepdim=True)
    for _ in range(steps):
        image_OI = (direction_OI @ curvature_II) * mask_OI
        length_O1 = _ratio(energy_O1, (direction_OI * image_OI).sum(1, keepdim=True))
        value_OI += length_O1 * direction_OI
        residual_OI -= length_O1 * image_OI
        scaled_OI = residual_OI * scale_I
        next_energy_O1 = (residual_OI * scaled_OI).sum(1, keepdim=True)
        direction_OI = scaled_OI + _ratio(next_energy_O1, energy_O1) * direction_OI
        energy_O1 = next_energy_O1
    better_O1 = _row_error(weight_OI - value_OI, gram_II) <= _row_error(
        weight_OI - pruned_OI, gram_II
    )
    return torch.where(better_O1, value_OI, pruned_OI)


def _ratio(numerator_O1: Tensor, denominator_O1: Tensor) -> Tensor:
    return torch.where(denominator_O1 > 0, numerator_O1 / denominator_O1, 0)


def _row_error(delta_OI: Tensor, gram_II: Tensor) -> Tensor:
    return ((delta_OI @ gram_II) * delta_OI).sum(1, keepdim=True)
