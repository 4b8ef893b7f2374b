"""Pruning methods: pure functions `(weight, gram, pattern) -> weight`.

O out features, I in features. `gram_II` is the sum of x xᵀ over calibration tokens. Every method
takes and returns fp32, leaves its inputs alone and returns a weight that follows the pattern.
To add one, write the function and name it here.
"""

from collections.abc import Callable

from torch import Tensor

from moiety.experts.methods.refit import refit
from moiety.experts.methods.saliency import magnitude, wanda
from moiety.experts.methods.sparsegpt import sparsegpt
from moiety.experts.pattern import Pattern

Method = Callable[[Tensor, Tensor, Pattern], Tensor]

METHODS: dict[str, Method] = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}

__all__ = ["METHODS", "Method", "magnitude", "refit", "relative_error", "sparsegpt", "wanda"]


def relative_error(weight_OI: Tensor, pruned_OI: Tensor, gram_II: Tensor) -> float:
    """Output error on the calibration tokens: `tr(ΔGΔᵀ) / tr(WGWᵀ)`, 0 for no change."""
    delta_OI = weight_OI - pruned_OI
    error = ((delta_OI @ gram_II) * delta_OI).sum()
    total = ((weight_OI @ gram_II) * weight_OI).sum()
    return float(error / total) if float(total) > 0 else 0.0
