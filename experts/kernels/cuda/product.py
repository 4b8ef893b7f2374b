# type: ignore  # Triton's own language and its launches are no Python to a type checker.
"""Products with packed 2:4 matrices as one Triton kernel, for any expert's tokens.

A program takes `BN` rows of one matrix and `BM` tokens of one expert through `KS * EACH` spans of
256 columns. A word of codes and the values of its eight groups become, in registers, the 16-bit
tile that the tensor cores multiply; sums are fp32. `KS` sets of warps share the spans, so that one
token still keeps a multiprocessor busy. `GATED` takes half of the rows from the gate and half from
the up matrix and gives `activation(gate) * up`.

Each warp multiplies its own rows: as one batched product with the warps as the batch, which Triton
compiles to `mma.sync` whose operand is laid out just as the words were expanded. A plain product of
64 rows or more would become `wgmma` on Hopper and send every expanded tile through shared memory.

R routed rows, N rows and K columns of a matrix, S splits of the columns.
"""

import triton
import triton.language as tl

from moiety.experts.kernels.cuda.expand import columns, expand, load_words


@triton.jit(do_not_specialize=["total", "stack"])
def product(
    input,
    values,
    codes,
    scale,
    output,
    token_of_row,
    block_expert,
    block_start,
    block_end,
    total,
    stack,
    rows,
    width,
    value_words,
    value_step,
    code_words,
    scale_words,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVE: tl.constexpr,
    GATHER: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    WARPS: tl.constexpr,
    KS: tl.constexpr,
    SPLITS: tl.constexpr,
    EACH: tl.constexpr,
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`output` (S, R, N) in fp32 where SPLITS, else (R, N); arguments as `forward.py` gives them."""
    W: tl.constexpr = 8
    HALF: tl.constexpr = input.dtype.element_ty
    WORDS: tl.constexpr = 8 if KIND == 16 else KIND // 2
    BATCH: tl.constexpr = KS * BN // WARPS
    block = tl.program_id(1)
    if MODE == "one":
        expert = tl.full((), 0, tl.int64)
        start = block * BM
        end = total
    elif MODE == "direct":
        expert = tl.load(block_expert + block).to(tl.int64)
        start = block
        end = block + 1
    else:
        expert = tl.load(block_expert + block).to(tl.int64)
        start = tl.load(block_start + block)
        end = tl.load(block_end + block)
    if (expert < 0) | (expert >= stack):
        return
    row_m = start + tl.arange(0, BM)
    there_m = row_m < end
    if not GATHER:
        token_m = row_m
    elif MODE == "direct":
        token_m = row_m // ACTIVE
    else:
        token_m = tl.load(token_of_row + row_m, mask=there_m, other=0)

    slot_r = tl.arange(0, KS * BN)
    row_r = _row(tl.program_id(0), slot_r % BN, rows, GATED, BN)
    first_r = slot_r // BN * EACH
    values += expert * value_step
    codes += expert * rows * code_words
    scale += expert * rows * scale_words
    value_r = row_r * value_words + first_r * (WORDS * W)
    code_r = row_r * code_words + first_r * W
    scale_r = row_r * scale_words + first_r
    column_kk = tl.arange(0, KS)[:, None] * (EACH * 32 * W) + tl.arange(0, 4 * W)[None, :]
    input_kkm = column_kk[:, :, None] + (token_m * width)[None, None, :]

    begin = tl.program_id(2) * (KS * EACH)
    sums = tl.zeros((WARPS, BATCH, BM), tl.float32)
    for turn in tl.range(0, EACH, num_stages=STAGES):
        span = begin + turn
        left_r = first_r + span
        code = load_words(codes + span * W, code_r, left_r * W, W, code_words, EVEN)
        at = span * (WORDS * W)
        packed = load_words(
            values + at, value_r, left_r * (WORDS * W), WORDS * W, value_words, EVEN
        )
        pairs = expand(code, packed, KIND, KS * BN, HALF, PTX)
        if KIND != 16:
            both = load_words(scale + span, scale_r, left_r, 1, scale_words, EVEN)
            both = both.reshape(WARPS, BATCH, 1)
        group = tl.zeros((WARPS, BATCH, BM), tl.float32)
        for plane in tl.static_range(8):
            tile = columns(pairs[plane], pairs[8 + plane], HALF, KS * BN, W)
            tile = tile.reshape(WARPS, BATCH, 4 * W)
            column = span * (32 * W) + plane * (4 * W)
            there = there_m[None, None, :]
            if not EVEN:
                there = there & (column + column_kk < width)[:, :, None]
            token = tl.load(
                input + column + input_kkm, mask=there, other=0.0, eviction_policy="evict_last"
            )
            token = tl.broadcast_to(token[:, None, :, :], (KS, WARPS // KS, 4 * W, BM))
            token = token.reshape(WARPS, 4 * W, BM)
            if KIND == 16:
                sums = _dot(tile, token, sums, PTX)
            else:
                group = _dot(tile, token, group, PTX)
                if plane == 3:
                    sums += group * (both << 16).to(tl.float32, bitcast=True)
                    group = tl.zeros((WARPS, BATCH, BM), tl.float32)
                if plane == 7:
                    sums += group * (both & -65536).to(tl.float32, bitcast=True)

    sums = sums.reshape(KS, BN, BM)
    sums = tl.sum(sums, axis=0) if KS > 1 else sums.reshape(BN, BM)
    if GATED:
        NARROW: tl.constexpr = BN // 2
        gate, up = tl.split(tl.permute(sums.reshape(2, NARROW, BM), (1, 2, 0)))
        sums = _activate(gate, ACTIVATION) * up
        rows = rows // 2
    else:
        NARROW: tl.constexpr = BN
    out_n = tl.program_id(0) * NARROW + tl.arange(0, NARROW)
    at = row_m.to(tl.int64)[None, :] * rows + out_n[:, None]
    if SPLITS:
        at += tl.program_id(2).to(tl.int64) * total * rows
    there = (out_n < rows)[:, None] & there_m[None, :]
    tl.store(output + at, sums.to(output.dtype.element_ty), mask=there)


@triton.jit
def _row(program, slot_r, rows, GATED: tl.constexpr, BN: tl.constexpr):
    """The row of the matrix in each place; one that is not there stands for the first."""
    if GATED:
        within = program * (BN // 2) + slot_r % (BN // 2)
        row_r = tl.where(slot_r < BN // 2, within, rows // 2 + within)
        there = within < rows // 2
    else:
        row_r = program * BN + slot_r
        there = row_r < rows
    return tl.where(there, row_r, 0)


@triton.jit
def _dot(tile, token, sums, PTX: tl.constexpr):
    """fp32 sums; the interpreter multiplies bf16 only as fp32."""
    if PTX:
        sums = tl.dot(tile, token, sums)
    else:
        sums = tl.dot(tile.to(tl.float32), token.to(tl.float32), sums, input_precision="ieee")
    return sums


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate * tl.sigmoid(2.0 * inner)
    else:
        active = tl.maximum(gate, 0.0)
    return active
