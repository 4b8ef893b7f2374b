"""Where a dense product takes over from the kernels: same results, and only where it was faster."""

from typing import Any

import pytest
import torch

from moiety.experts import kernels
from moiety.experts.kernels import crossover, layouts, ops
from moiety.experts.kernels.library import Isa


class Amx:
    """Compiled kernels of a CPU with AMX, as far as the crossover asks."""

    best = Isa.AMX


@pytest.mark.parametrize(
    ("isa", "layout", "dtype", "tokens", "expected"),
    [
        (Isa.AMX, "rows", torch.bfloat16, 2048, True),
        (Isa.AMX, "rows", torch.bfloat16, 2047, False),
        (Isa.AMX, "tiled", torch.bfloat16, 8192, False),
        (Isa.AMX, "rows", torch.float32, 8192, False),
        (Isa.AVX512, "rows", torch.bfloat16, 8192, False),
    ],
)
def test_dense_products_take_over_where_they_are_faster(
    monkeypatch: pytest.MonkeyPatch,
    isa: Isa,
    layout: str,
    dtype: torch.dtype,
    tokens: int,
    expected: bool,
) -> None:
    large = kernels.Weights(
        torch.empty(1, 512, 256), torch.empty(1, 512, 64), None, None, 512, 512, "bf16"
    )
    large = large if layout == "rows" else large._replace(mask=None)
    small, huge = large._replace(rows=16), large._replace(rows=1 << 15)
    wide = large._replace(columns=2048)
    found = Amx()
    found.best = isa
    monkeypatch.setattr(crossover, "native", lambda _: found)
    input_TI = torch.empty(1, 512, dtype=dtype)
    assert crossover.better_dense(input_TI, large, tokens) == expected
    assert crossover.better_dense(input_TI, wide, 2 * tokens) == expected
    assert not crossover.better_dense(input_TI, wide, tokens // 2)
    assert not crossover.better_dense(input_TI, small, tokens)
    assert not crossover.better_dense(input_TI, huge, tokens)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layout", ["rows", "tiled"])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_expanded_matrices_give_what_the_kernels_give(
    packs: Any, monkeypatch: pytest.MonkeyPatch, kind: str, layout: str
) -> None:
    torch.manual_seed(0)
    rows, below = (
        kernels.packed(values, mask, width, scale)
        for width, (_, values, mask, scale) in (
            (20, packs.stacked(3, 72, 20, "2:4", kind)),
            (36, packs.stacked(3, 20, 36, "2:4", kind)),
        )
    )
    if layout == "tiled":
        rows, below = layouts.tiled(rows.regrouped(6)), layouts.tiled(below)
        assert rows is not None and below is not None
    hidden, inner = torch.randn(40, 20).bfloat16(), torch.randn(40, 36).bfloat16()
    routes = torch.randint(3, (40, 2)), torch.rand(40, 2)
    both = []
    for expands in (False, True):
        monkeypatch.setattr(ops, "better_dense", lambda *_, e=expands: e)
        both.append(
            (
                kernels.sparse_linear(inner, below.one(0)),
                kernels.sparse_routed_linear(inner, below, *routes),
                kernels.sparse_experts(hidden, rows, below, *routes),
            )
        )
    for ours, dense in zip(*both, strict=True):
        torch.testing.assert_close(ours, dense, rtol=3e-2, atol=3e-2)
