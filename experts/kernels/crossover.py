"""When a matrix is expanded for torch's dense product instead of multiplied as it is stored.

Only where the CPU multiplies bf16 with AMX, whose products of many tokens are bound by arithmetic
that knows no sparsity. Measured on Emerald Rapids: docs/kernels.md has the figures.
"""

import torch
from torch import Tensor

from moiety.experts.kernels.layouts import native
from moiety.experts.kernels.library import Isa
from moiety.experts.kernels.weights import Weights

# Below so many elements a product takes no longer than the calls around it.
SMALLEST = 1 << 18
# Tokens of one matrix from which on it is expanded: of tiles, and of rows of any pattern, which are
# multiplied as fast but expanded more slowly.
DENSE_FROM = 1024
ROWS_DENSE_FROM = 4096


def better_dense(input_TI: Tensor, weights: Weights, tokens: float) -> bool:
    """Whether `tokens` tokens of each matrix are multiplied sooner by expanding it."""
    kernels = native(input_TI)
    return (
        kernels is not None
        and kernels.best == Isa.AMX
        and input_TI.dtype == torch.bfloat16
        and weights.rows * weights.columns >= SMALLEST
        and tokens >= (DENSE_FROM if weights.is_tiled else ROWS_DENSE_FROM)
    )
