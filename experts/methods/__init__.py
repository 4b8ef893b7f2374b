"""Pruning methods: pure functions `(weight, gram, pattern) -> weight`.

O out features, I in features. `gram_II` is the sum of x xᵀ over calibration tokens. Every method
takes and returns fp32, leaves its inputs alone and returns a weight that follows the pattern; a
dense pattern gives the weight back. To add one, write the function and name it here. Around
them: `refit` moves the kept values of any mask, `quantise` puts them on an integer grid,
`owl_densities` shares a density out among blocks. docs/pruning-methods.md compares them.
"""

from collections.abc import Callable

from torch import Tensor

from moiety.experts.methods.allocation import outlier_share, owl_densities
from moiety.experts.methods.alps import alps
from moiety.experts.methods.problem import output_energy, relative_error, relative_errors
from moiety.experts.methods.quantise import quantise
from moiety.experts.methods.refit import refit
from moiety.experts.methods.saliency import magnitude, ria, wanda
from moiety.experts.methods.sparsegpt import sparsegpt
from moiety.experts.pattern import Pattern

Method = Callable[[Tensor, Tensor, Pattern], Tensor]

METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "ria": ria,
    "sparsegpt": sparsegpt,
    "alps": alps,
}

__all__ = [
    "METHODS",
    "Method",
    "alps",
    "magnitude",
    "outlier_share",
    "output_energy",
    "owl_densities",
    "quantise",
    "refit",
    "relative_error",
    "relative_errors",
    "ria",
    "sparsegpt",
    "wanda",
]
