"""Products of many rows and tokens, in turn with torch's own."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from moiety.experts import kernels


@pytest.mark.parametrize("layout", ["tiles", "rows"])
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_long_products_go_well_with_torchs_own(packs: Any, kind: str, layout: str) -> None:
    """Several groups of rows and panels of tokens; torch may use AMX's registers in between."""
    torch.manual_seed(0)
    _, values, mask, scale = packs.stacked(1, 600, 580, "2:4", kind)
    stored = kernels.packed(values, mask, 580, scale)
    weights = (kernels.tiled(stored) if layout == "tiles" else None) or stored
    dense_OI = kernels.dense(stored, 0, torch.float32)
    for tokens in (3, 40, 70, 300):
        input_TI = torch.randn(tokens, 580).bfloat16()
        theirs_TO = functional.linear(input_TI, dense_OI.bfloat16())
        expected_TO = input_TI.double() @ dense_OI.double().T
        size_TO = input_TI.double().abs() @ dense_OI.double().abs().T
        output_TO = kernels.sparse_linear(input_TI, weights).double()
        bound_TO = 1e-5 * size_TO + expected_TO.abs() / 250
        assert ((output_TO - expected_TO).abs() <= bound_TO).all()
        assert torch.equal(functional.linear(input_TI, dense_OI.bfloat16()), theirs_TO)
