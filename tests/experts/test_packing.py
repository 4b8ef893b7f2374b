"""The packed format: round trips, exact bytes, sizes, and what it refuses."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save
from torch import Tensor

from moiety.errors import InputError
from moiety.experts import Packed, Pattern, pack, packing

TWO_FOUR = Pattern(2, 4)
HALF = Pattern.unstructured(0.5)
GOLDEN = Path(__file__).parent / "golden" / "packed-v1.safetensors"


@given(
    st.sampled_from(["2:4", "1:4", "4:8", "3:4", "3:6", "8:16", "0.5", "0.3", "0.71", "dense"]),
    st.sampled_from(packing.VALUES),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_unpacking_gives_the_matrix_back(
    packs: Any, pattern: str, values: str, rows: int, groups: int, seed: int
) -> None:
    rule = Pattern.parse(pattern)
    columns = groups * (rule.group or 5)
    weight, packed = packs.packed(rows, columns, pattern, values, seed)
    assert torch.equal(packed.dense(), weight)
    assert packed.values.shape == packing.stored_shape(rule, values, rows, columns)
    packing.check_packed("w", packed, rule)
    again = pack(packed.dense(), rule, values, packed.scale_OG)
    assert torch.equal(again.dense(), weight)


def test_wide_rows_have_a_scale_for_each_128_columns(packs: Any) -> None:
    weight, packed = packs.packed(3, 300, "0.5", "int8")
    assert packed.scale_OG.shape == (3, 3) and packed.scale_OG.dtype == torch.bfloat16
    assert torch.equal(packed.dense(), weight)
    assert list(packed.tensors("x.weight")) == ["x.weight", "x.weight_mask", "x.weight_scale"]


@pytest.mark.parametrize(
    ("pattern", "values", "bits"),
    [
        ("2:4", "bf16", 9),
        ("2:4", "fp32", 17),
        ("0.5", "bf16", 9),
        ("2:4", "int8", 5.125),
        ("0.5", "int8", 5.125),
        ("2:4", "int4", 3.125),
        ("0.25", "int4", 2.125),
    ],
)
def test_bits_a_weight(packs: Any, pattern: str, values: str, bits: float) -> None:
    weight, packed = packs.packed(24, 256, pattern, values)
    assert packed.nbytes * 8 == bits * weight.numel()


def examples() -> dict[str, Tensor]:
    """Matrices written out by hand, packed: their bytes are the format."""
    row = torch.tensor([[0, 5.0, 0, 6, 7, 8, 0, 0, 0, 0, 9, 0]])
    ragged = torch.tensor([[1.0, -2, 3, 0], [0, 0, 0, 4]])
    odd = torch.tensor([[0, 1.5, 0, 0, -3.5, 0, 0, 0, 1, 0, 0, 0]])
    one, two = torch.tensor([[0.5]]), torch.tensor([[1.0], [2.0]])
    matrices = {
        "two_four.weight": pack(row, TWO_FOUR),
        "half.weight": pack(ragged, HALF, "fp32"),
        "int8.weight": pack(row, TWO_FOUR, "int8", one),
        "int4.weight": pack(ragged, HALF, "int4", two),
        "odd.weight": pack(odd, Pattern(1, 4), "int4", one),
    }
    return {n: t for name, packed in matrices.items() for n, t in packed.tensors(name).items()}


def test_layout_is_version_one() -> None:
    """Kept values in row-major order; masks lowest bit first; int4 codes low half first, + 8."""
    stored = examples()
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {
        "two_four.weight": [[5, 6, 7, 8, 0, 9]],
        "two_four.weight_mask": [[0b0011_1010, 0b0000_0101]],
        "half.weight": [1, -2, 3, 4],
        "half.weight_mask": [[0b0111], [0b1000]],
        "int8.weight": [[10, 12, 14, 16, 0, 18]],
        "int8.weight_mask": [[0b0011_1010, 0b0000_0101]],
        "int8.weight_scale": [[0.5]],
        "int4.weight": [8 + 1 | 8 - 2 << 4, 8 + 3 | 8 + 2 << 4],
        "int4.weight_mask": [[0b0111], [0b1000]],
        "int4.weight_scale": [[1], [2]],
        "odd.weight": [[8 + 3 | 8 - 7 << 4, 8 + 2]],
        "odd.weight_mask": [[0b0001_0010, 0b0000_0001]],
        "odd.weight_scale": [[0.5]],
    }
    assert save(stored, {"format": "pt"}) == GOLDEN.read_bytes()
    assert all(torch.equal(stored[name], tensor) for name, tensor in load_file(GOLDEN).items())


def test_missing_non_zeros_become_explicit_zeros() -> None:
    packed = pack(torch.tensor([[0, 0, 0, 1.0], [0, 0, 0, 0]]), HALF, "fp32")
    assert packed.values.tolist() == [0, 0, 0, 1]
    assert packed.mask_OB.tolist() == [[0b1111], [0b0000]]
    mask = torch.tensor([[True, False, False, True], [False, True, False, True]])
    packed = pack(torch.tensor([[0, 0, 0, 1.0], [0, 0, 0, 0]]), HALF, mask_OI=mask)
    assert packed.mask_OB.tolist() == [[0b1001], [0b1010]]


ONES = torch.ones(1, 1)
ROW = torch.tensor([[1.0, 0, 0, 2.0]])
KEPT = ROW != 0


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("follows pattern 2:4, but some group", (torch.ones(2, 4), TWO_FOUR)),
        ("follows pattern 0.5, but it has more than 4", (torch.ones(2, 4), HALF)),
        ("multiple of 4", (torch.ones(2, 5), TWO_FOUR)),
        ("NaN", (torch.tensor([[float("nan"), 0, 0, 0]]), TWO_FOUR)),
        ("values must be one of bf16", (ROW, TWO_FOUR, "int3")),
        ("range of fp16, but the largest is 2e\\+06", (ROW * 1e6, TWO_FOUR, "fp16")),
        ("need a scale of shape \\(1, 1\\), but there is none", (ROW, TWO_FOUR, "int8")),
        ("need a scale of shape", (ROW, TWO_FOUR, "int8", torch.ones(1, 2))),
        ("bf16 holds exactly", (ROW, TWO_FOUR, "int8", ONES / 3)),
        ("scales above 0", (ROW, TWO_FOUR, "int8", -ONES)),
        ("scales above 0", (ROW, TWO_FOUR, "int8", ONES * float("inf"))),
        ("whole multiple", (ROW, TWO_FOUR, "int8", ONES * 0.75)),
        ("at most 7 times", (ROW, TWO_FOUR, "int4", ONES / 4)),
        ("at most 127 times", (ROW, TWO_FOUR, "int8", ONES / 64)),
        ("no scale for values bf16", (ROW, TWO_FOUR, "bf16", ONES)),
        ("boolean mask", (ROW, TWO_FOUR, "bf16", None, KEPT.int())),
        ("keeps exactly 2:4", (ROW, TWO_FOUR, "bf16", None, ~KEPT | KEPT)),
        ("zeros outside the mask", (ROW, TWO_FOUR, "bf16", None, ~KEPT)),
    ],
)
def test_packing_refuses_what_would_lose_weights(reason: str, arguments: Any) -> None:
    with pytest.raises(InputError, match=reason):
        pack(*arguments)


def damaged(packs: Any, pattern: str, values: str, change: str) -> tuple[Any, ...]:
    """Values, mask and scale of a packed 3 x 12 matrix after one change."""
    _, good = packs.packed(3, 12, pattern, values)
    values_, mask = good.values.clone(), good.mask_OB.clone()
    scale = None if good.scale_OG is None else good.scale_OG.clone()
    match change:
        case "flipped bit":
            mask[1, 0] ^= 1
        case "padding bit":
            mask[2, 1] |= 1 << 7
        case "infinite":
            values_.view(-1)[0] = float("inf")
        case "short":
            values_ = values_[..., :-1]
        case "short mask":
            mask = mask[:, :1]
        case "wide mask":
            mask = mask.short()
        case "double":
            values_ = values_.double()
        case "lowest int8":
            values_.view(-1)[0] = -128
        case "lowest int4":
            values_.view(-1)[0] &= 0xF0
        case "padding half":
            values_[..., -1] |= 0x90
        case "no scale":
            scale = None
        case "scale too many":
            scale = torch.ones(3, 1, dtype=torch.bfloat16)
        case "zero scale" if scale is not None:
            scale[0] = 0
        case "fp32 scale" if scale is not None:
            scale = scale.float()
        case "other scale" if scale is not None:
            scale = scale[:2]
    return values_, mask, scale


@pytest.mark.parametrize(
    ("pattern", "values", "change", "reason"),
    [
        ("2:4", "bf16", "flipped bit", "exactly 2:4 in every group"),
        ("3:6", "bf16", "flipped bit", "exactly 3:6 in every group"),
        ("0.5", "bf16", "flipped bit", "exactly 0.5 of each matrix"),
        ("2:4", "bf16", "padding bit", "exactly 2:4"),
        ("0.5", "bf16", "padding bit", "exactly 0.5"),
        ("2:4", "bf16", "infinite", "finite"),
        ("0.5", "bf16", "short", "expected values"),
        ("2:4", "bf16", "short", "expected values"),
        ("2:4", "bf16", "short mask", "expected values"),
        ("2:4", "bf16", "wide mask", "uint8"),
        ("2:4", "bf16", "double", "bf16"),
        ("2:4", "bf16", "scale too many", "no scale"),
        ("2:4", "int8", "lowest int8", "from -127 to 127"),
        ("0.5", "int4", "lowest int4", "from -7 to 7"),
        ("1:4", "int4", "padding half", "unused half"),
        ("2:4", "int8", "no scale", "_scale: expected bf16 scales"),
        ("0.5", "int8", "zero scale", "_scale: expected finite scales above 0"),
        ("2:4", "int4", "fp32 scale", "_scale: expected bf16 scales"),
        ("2:4", "int4", "other scale", "_scale: expected bf16 scales"),
    ],
)
def test_check_names_the_tensor_and_the_rule(
    packs: Any, pattern: str, values: str, change: str, reason: str
) -> None:
    stored, mask, scale = damaged(packs, pattern, values, change)
    kind = values if values in packing.LARGEST_CODE else None
    with pytest.raises(InputError, match=rf"blocks\.3\.w.*{reason}"):
        packing.check("blocks.3.w", stored, mask, 12, Pattern.parse(pattern), scale, kind)


def test_check_takes_stacks_and_only_the_stated_kind(packs: Any) -> None:
    _, values, mask, scale = packs.stacked(3, 4, 20, "0.5", "int8")
    packing.check("w", values, mask, 20, HALF, scale, "int8")
    with pytest.raises(InputError, match="values in int4"):
        packing.check("w", values, mask, 20, HALF, scale, "int4")
    with pytest.raises(InputError, match="values in bf16, fp16, fp32"):
        packing.check("w", values, mask, 20, HALF, scale)
    values, mask = values.clone(), mask.clone()
    mask[0, 0, 0] ^= 1
    mask[1, 0, 0] ^= 1
    with pytest.raises(InputError, match="of each matrix"):
        packing.check("w", values, mask, 20, HALF, scale, "int8")


def test_check_packed_compares_the_rows(packs: Any) -> None:
    _, good = packs.packed(3, 12)
    with pytest.raises(InputError, match="expected 4 rows"):
        packing.check_packed("w", Packed(good.values, good.mask_OB, None, 4, 12), TWO_FOUR)
