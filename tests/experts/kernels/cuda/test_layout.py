"""Planes: there and back bit for bit, whatever the shape and the values."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.experts import kernels
from moiety.experts.kernels.cuda import layout


@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8", "int4"])
@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 9), groups=st.integers(1, 150), stack=st.integers(1, 3))
def test_planes_and_back(packs: Any, kind: str, rows: int, groups: int, stack: int) -> None:
    _, values, mask, scale = packs.stacked(stack, rows, 4 * groups, "2:4", kind)
    stored = kernels.packed(values, mask, 4 * groups, scale)
    planes = layout.planes(stored)
    assert (planes.layout, planes.stack, planes.rows) == ("planes", stack, rows)
    back = kernels.untiled(planes)
    assert back[3:] == stored[3:]
    for ours, theirs in zip(back[:3], stored[:3], strict=True):
        if theirs is not None:
            assert isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)


@pytest.mark.parametrize(("kind", "bits"), [("bf16", 9), ("int8", 5.125), ("int4", 3.125)])
def test_planes_take_the_bytes_of_the_stored_form(packs: Any, kind: str, bits: float) -> None:
    _, values, mask, scale = packs.stacked(2, 8, 1024, "2:4", kind)
    planes = layout.planes(kernels.packed(values, mask, 1024, scale))
    tensors = [tensor for tensor in planes[:4] if tensor is not None]
    assert sum(tensor.nbytes for tensor in tensors) == 2 * 8 * 1024 * bits / 8


def test_floating_point_values_are_not_copied(packs: Any) -> None:
    _, values, mask, _ = packs.stacked(1, 8, 64, "2:4", "bf16")
    planes = layout.planes(kernels.packed(values, mask, 64))
    assert planes.values.data_ptr() == values.data_ptr()


@pytest.mark.parametrize(
    ("pattern", "kind"), [("1:4", "bf16"), ("0.5", "bf16"), ("2:4", "fp32"), ("dense", "fp16")]
)
def test_other_patterns_and_kinds_do_not_fit(packs: Any, pattern: str, kind: str) -> None:
    _, values, mask, scale = packs.stacked(1, 8, 64, pattern, kind)
    assert not layout.fits(kernels.packed(values, mask, 64, scale))
