"""When torch's dense product is the faster one. docs/kernels.md has the figures.

Sparse matrices are expanded for it only where the CPU multiplies bf16 with AMX, whose products of
many tokens are bound by arithmetic that knows no sparsity; and then only small ones in rows, which
take longer to expand than tiles. Dense ones are left to it but for few tokens, which read a matrix
more slowly there than here. Measured on Emerald Rapids, with oneDNN kept to each instruction set.
"""

import torch
from torch import Tensor

from moiety.experts.kernels.layouts import native
from moiety.experts.kernels.library import Isa
from moiety.experts.kernels.weights import Weights

# Elements of a matrix in rows that is expanded. Below the first a product takes no longer than the
# calls around it; memory for more than the last takes longer to get than the product gains.
SMALLEST, LARGEST = 1 << 18, 1 << 23
# The fewest tokens that it is for: fewer where rows are short, since results then take much of a
# product's time here.
DENSE_FROM, SHORT_FROM, SHORT = 4096, 2048, 1024
# Elements of the smallest dense matrix that is multiplied here, and the most tokens that do it.
# torch's bf16 is slow on AVX2; with AVX-512's bf16 products and no AMX (AMD) none were measured.
SMALLEST_DENSE = 1 << 20
_FEW = {
    Isa.AVX2: {torch.bfloat16: 64, torch.float32: 12},
    Isa.AVX512: {torch.bfloat16: 12, torch.float32: 12},
    Isa.AVX512_BF16: {torch.bfloat16: 4, torch.float32: 12},
    Isa.AMX: {torch.bfloat16: 4, torch.float32: 12},
}


def better_dense(input_TI: Tensor, weights: Weights, tokens: float) -> bool:
    """Whether `tokens` tokens of each matrix are multiplied sooner by expanding it."""
    if weights.is_tiled:
        return False
    kernels = native(input_TI)
    return (
        kernels is not None
        and kernels.best == Isa.AMX
        and input_TI.dtype == torch.bfloat16
        and SMALLEST <= weights.rows * weights.columns <= LARGEST
        and tokens >= (SHORT_FROM if weights.columns <= SHORT else DENSE_FROM)
    )


def reads_faster(input: Tensor, weight_OI: Tensor) -> bool:
    """Whether a dense matrix (O, I) is multiplied sooner here than by torch, by input (..., I)."""
    kernels = native(weight_OI)
    if kernels is None or weight_OI.numel() < SMALLEST_DENSE or not weight_OI.is_contiguous():
        return False
    most = _FEW.get(kernels.best, {}).get(weight_OI.dtype, 0)
    return 0 < input.numel() <= most * weight_OI.shape[1]
