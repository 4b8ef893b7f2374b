"""The packed format: round trips, bytes on disk, and what it refuses."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from moiety.errors import InputError
from moiety.experts import Pattern, pack, packing

TWO_FOUR = Pattern(2, 4)


def sparse(rows: int, columns: int, pattern: Pattern, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns)
    return weight * pattern.mask(weight.abs())


@given(
    st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 4)]),
    st.integers(1, 7),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_unpacking_gives_the_matrix_back(
    counts: tuple[int, int], rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    pattern = Pattern(*counts)
    weight = sparse(rows, groups * pattern.group, pattern, seed).to(dtype)
    packed = pack(weight, pattern)
    assert torch.equal(packed.dense(), weight)
    packing.check("w", packed.values_OK, packed.mask_OB, weight.shape[1], pattern)


def test_bf16_takes_nine_sixteenths() -> None:
    weight = sparse(24, 64, TWO_FOUR).bfloat16()
    assert pack(weight, TWO_FOUR).nbytes * 16 == weight.nbytes * 9


def test_layout_is_version_one() -> None:
    """Golden bytes: kept values in column order, lowest bit first, eight columns a byte."""
    weight = torch.tensor([[0, 5.0, 0, 6, 7, 8, 0, 0, 0, 0, 9, 0]])
    packed = pack(weight, TWO_FOUR)
    assert packed.values_OK.tolist() == [[5, 6, 7, 8, 0, 9]]
    assert packed.mask_OB.tolist() == [[0b0011_1010, 0b0000_0101]]


def test_packing_refuses_what_would_lose_weights() -> None:
    with pytest.raises(InputError, match="follows pattern 2:4"):
        pack(torch.ones(2, 4), TWO_FOUR)
    with pytest.raises(InputError, match="NaN"):
        pack(torch.tensor([[float("nan"), 0, 0, 0]]), TWO_FOUR)


def damaged() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    good = pack(sparse(3, 12, TWO_FOUR), TWO_FOUR)
    flipped, padding, infinite = good.mask_OB.clone(), good.mask_OB.clone(), good.values_OK.clone()
    flipped[1, 0] ^= 1
    padding[2, 1] |= 1 << 7
    infinite[0, 0] = float("inf")
    return {
        "exactly 2:4": (good.values_OK, flipped),
        "exactly 2:4 ": (good.values_OK, padding),
        "finite": (infinite, good.mask_OB),
        "expected values": (good.values_OK[:, :-1], good.mask_OB),
        "uint8": (good.values_OK, good.mask_OB.short()),
        "bf16": (good.values_OK.double(), good.mask_OB),
    }


@pytest.mark.parametrize("reason", damaged())
def test_check_names_the_tensor_and_the_rule(reason: str) -> None:
    values, mask = damaged()[reason]
    with pytest.raises(InputError, match=rf"blocks\.3\.w.*{reason.strip()}"):
        packing.check("blocks.3.w", values, mask, 12, TWO_FOUR)
