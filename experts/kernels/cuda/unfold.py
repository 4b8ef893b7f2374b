# type: ignore  # Triton's own language and its launches are no Python to a type checker.
"""Planes to dense matrices, for many tokens at once and for gradients.

N rows, K columns of a matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moiety.experts.kernels.cuda.expand import columns, expand, load_words
from moiety.experts.kernels.cuda.layout import SPAN
from moiety.experts.kernels.weights import Weights

_ROWS = 32


def unfold(weights: Weights, dtype: torch.dtype, kind: int, half: torch.dtype, ptx: bool) -> Tensor:
    """All matrices of the stack (E, O, I), dense."""
    codes = weights.mask
    assert codes is not None
    shape = (weights.stack, weights.rows, weights.columns)
    dense_EOI = torch.empty(shape, dtype=dtype, device=codes.device)
    spans = triton.cdiv(weights.columns, SPAN)
    scale = codes if weights.scale is None else weights.scale
    probe = torch.empty(0, dtype=half, device=codes.device)
    _unfold[(triton.cdiv(weights.rows, _ROWS), spans, weights.stack)](
        probe,
        weights.values,
        codes,
        scale,
        dense_EOI,
        weights.rows,
        weights.columns,
        weights.values.shape[-1],
        weights.values.stride(0),
        codes.shape[-1],
        scale.shape[-1],
        KIND=kind,
        EVEN=weights.columns % SPAN == 0,
        BN=_ROWS,
        PTX=ptx,
        num_warps=4,
    )
    return dense_EOI


@triton.jit
def _unfold(
    probe,
    values,
    codes,
    scale,
    dense,
    rows,
    width,
    value_words,
    value_step,
    code_words,
    scale_words,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    PTX: tl.constexpr,
):
    W: tl.constexpr = 8
    HALF: tl.constexpr = probe.dtype.element_ty
    WORDS: tl.constexpr = 8 if KIND == 16 else KIND // 2
    row_n = tl.program_id(0) * BN + tl.arange(0, BN)
    there_n = row_n < rows
    row_n = tl.where(there_n, row_n, 0)
    span = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64) * rows
    start_n = tl.zeros((BN,), tl.int32) + span
    code = load_words(
        codes + matrix * code_words + span * W, row_n * code_words, start_n * W, W, code_words, EVEN
    )
    packed = load_words(
        values + tl.program_id(2).to(tl.int64) * value_step + span * (WORDS * W),
        row_n * value_words,
        start_n * (WORDS * W),
        WORDS * W,
        value_words,
        EVEN,
    )
    pairs = expand(code, packed, KIND, BN, HALF, PTX)
    if KIND != 16:
        both = tl.load(scale + matrix * scale_words + row_n * scale_words + span)
    for plane in tl.static_range(8):
        tile = columns(pairs[plane], pairs[8 + plane], HALF, BN, W).to(tl.float32)
        if KIND != 16:
            bits = both << 16 if plane < 4 else both & -65536
            tile *= bits.to(tl.float32, bitcast=True)[:, None]
        column = span * (32 * W) + plane * (4 * W) + tl.arange(0, 4 * W)
        at = (matrix + row_n)[:, None] * width + column[None, :]
        there = there_n[:, None] & (column < width)[None, :]
        tl.store(dense + at, tile.to(dense.dtype.element_ty), mask=there)
