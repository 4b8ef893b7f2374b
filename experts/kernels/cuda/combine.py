# type: ignore  # Triton's own language and its launches are no Python to a type checker.
"""The last step: a token's rows, in any number of partial sums, weighted and added.

T tokens, A active experts, S partial sums, R routed rows, O out features.
"""

import triton
import triton.language as tl
from torch import Tensor

_WIDTH = 512


def combine(
    sums_SRO: Tensor,
    row_R: Tensor | None,
    stack: int,
    weights_TA: Tensor | None,
    base_TO: Tensor | None,
    like_TI: Tensor,
    *,
    sorted_rows: bool,
) -> Tensor:
    """`base + Σ_a w_a Σ_s sums` (T, O) in the dtype of `like_TI`; without `row_R`, row t is token t's.

    `row_R` are the routes' rows if those are sorted, else their experts, each route in a row of its
    own. A route to none of the `stack` experts adds nothing.
    """
    splits, rows, out_features = sums_SRO.shape
    tokens = len(like_TI)
    output_TO = like_TI.new_empty(tokens, out_features)
    row_R = sums_SRO if row_R is None else row_R
    _combine[(tokens, triton.cdiv(out_features, _WIDTH))](
        sums_SRO,
        row_R,
        row_R if weights_TA is None else weights_TA,
        sums_SRO if base_TO is None else base_TO,
        output_TO,
        rows,
        stack,
        out_features,
        ACTIVE=1 if weights_TA is None else weights_TA.shape[1],
        SPLITS=splits,
        SORTED=sorted_rows,
        WEIGHTED=weights_TA is not None,
        BASE=base_TO is not None,
        WIDTH=_WIDTH,
        num_warps=4,
    )
    return output_TO


@triton.jit(do_not_specialize=["rows", "stack"])
def _combine(
    sums,
    row_of_route,
    weights,
    base,
    output,
    rows,
    stack,
    out_features,
    ACTIVE: tl.constexpr,
    SPLITS: tl.constexpr,
    SORTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BASE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = out < out_features
    total = tl.zeros((WIDTH,), tl.float32)
    if BASE:
        total += tl.load(base + token * out_features + out, mask=there, other=0.0).to(tl.float32)
    for slot in tl.static_range(ACTIVE):
        route = token * ACTIVE + slot
        row = route
        if SORTED:
            row = tl.load(row_of_route + route).to(tl.int64)
        elif WEIGHTED:
            expert = tl.load(row_of_route + route)
            row = tl.where((expert < 0) | (expert >= stack), -1, route)
        if row >= 0:
            part = tl.zeros((WIDTH,), tl.float32)
            for split in tl.static_range(SPLITS):
                at = (split * rows + row) * out_features + out
                part += tl.load(sums + at, mask=there, other=0.0).to(tl.float32)
            if WEIGHTED:
                part *= tl.load(weights + route).to(tl.float32)
            total += part
    tl.store(output + token * out_features + out, total.to(output.dtype.element_ty), mask=there)
