"""Products of many rows and tokens, in turn with torch's own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moiety.experts import kernels
from moiety.experts.kernels.library import Library


def near(output_TO: Tensor, input_TI: Tensor, weight_OI: Tensor) -> bool:
    expected_TO = input_TI @ weight_OI.T
    bound_TO = 1e-5 * (input_TI.abs() @ weight_OI.abs().T) + expected_TO.abs() / 250
    return bool(((output_TO - expected_TO).abs() <= bound_TO).all())


@pytest.mark.parametrize("layout", ["tiles", "rows"])
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("rows", "columns"), [(600, 580), (1700, 420), (90, 2212)])
def test_long_products_go_well_with_torchs_own(
    packs: Any, kind: str, layout: str, rows: int, columns: int
) -> None:
    """Several groups of rows and panels of tokens; torch may use AMX's registers in between."""
    torch.manual_seed(0)
    _, values, mask, scale = packs.stacked(1, rows, columns, "2:4", kind)
    stored = kernels.packed(values, mask, columns, scale)
    weights = (kernels.tiled(stored) if layout == "tiles" else None) or stored
    dense_OI = kernels.dense(stored, 0, torch.float32)
    for tokens in (3, 40, 70, 112, 300, 700, 1100):
        input_TI = torch.randn(tokens, columns).bfloat16()
        theirs_TO = functional.linear(input_TI, dense_OI.bfloat16())
        output_TO = kernels.sparse_linear(input_TI, weights).double()
        exact, rounded = (
            near(output_TO, input_TI.double(), one_OI.double())
            for one_OI in (dense_OI, dense_OI.bfloat16())
        )
        assert exact or rounded
        assert torch.equal(functional.linear(input_TI, dense_OI.bfloat16()), theirs_TO)


@pytest.mark.parametrize("layout", ["tiles", "rows"])
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    [
        # The last of four parts is 81 tokens, of which tiles take 1024 columns at a time.
        pytest.param(90, 2212, 513, id="short last part"),
        pytest.param(1030, 48, 2100, id="results of 4 MB"),
    ],
)
def test_each_thread_takes_tokens_of_its_own(
    packs: Any, compiled: Library, layout: str, rows: int, columns: int, tokens: int
) -> None:
    torch.manual_seed(0)
    _, values, mask, scale = packs.stacked(1, rows, columns, "2:4", "bf16")
    stored = kernels.packed(values, mask, columns, scale)
    weights = (kernels.tiled(stored) if layout == "tiles" else None) or stored
    dense_OI = kernels.dense(stored, 0, torch.float64)
    input_TI = torch.randn(tokens, columns).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        output_TO = compiled.forward(input_TI.to(dtype), weights, threads=2).double()
        assert near(output_TO, input_TI.double(), dense_OI)
