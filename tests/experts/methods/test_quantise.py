"""Integer grids: zeros stay, codes fit, and rounding errors are made up for."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moiety.errors import InputError
from moiety.experts import Pattern, pack
from moiety.experts.methods import METHODS, quantise, refit, relative_errors, sparsegpt

TWO_FOUR = Pattern(2, 4)


def codes(weight: Tensor, scale: Tensor) -> Tensor:
    """Every weight divided by its scale."""
    return weight / scale.float().repeat_interleave(128, 1)[:, : weight.shape[1]]


def nearest(pruned: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round to nearest on the same grid."""
    largest = 2 ** (bits - 1) - 1
    spread = scale.float().repeat_interleave(128, 1)[:, : pruned.shape[1]]
    return (pruned / spread).round().clamp(-largest, largest) * spread


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([8, 4]),
    st.sampled_from(["2:4", "4:8", "0.5", "0.3", "dense"]),
    st.integers(1, 5),
    st.sampled_from([8, 64, 128, 136, 272]),
    st.integers(0, 50),
)
def test_codes_are_whole_numbers_in_range_and_zeros_stay(
    problem: Any, bits: int, pattern: str, rows: int, columns: int, seed: int
) -> None:
    weight, gram = problem(rows, columns, seed)
    pruned = sparsegpt(weight, gram, Pattern.parse(pattern))
    before = weight.clone(), pruned.clone(), gram.clone()
    found, scale = quantise(weight, pruned, gram, bits)
    assert scale.dtype == torch.bfloat16 and scale.shape == (rows, -(-columns // 128))
    assert (scale > 0).all()
    assert not found[pruned == 0].any()
    code = codes(found, scale)
    assert torch.equal(code, code.round())
    assert code.abs().max() <= 2 ** (bits - 1) - 1
    assert all(map(torch.equal, (weight, pruned, gram), before))
    again, same = quantise(weight, pruned, gram, bits)
    assert torch.equal(found, again) and torch.equal(scale, same)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("pattern", ["2:4", "0.5", "dense"])
def test_it_beats_rounding_to_nearest(problem: Any, bits: int, pattern: str) -> None:
    weight, gram = problem(32, 256)
    pruned = refit(weight, sparsegpt(weight, gram, Pattern.parse(pattern)), gram, 20)
    found, scale = quantise(weight, pruned, gram, bits)
    candidates = [pruned, found, nearest(pruned, scale, bits)]
    least, ours, theirs = relative_errors(weight, candidates, gram)
    assert ours - least < 0.7 * (theirs - least)


def test_eight_bits_cost_almost_nothing_and_four_a_little(problem: Any) -> None:
    weight, gram = problem(32, 256)
    pruned = refit(weight, sparsegpt(weight, gram, TWO_FOUR), gram)
    candidates = [pruned, *(quantise(weight, pruned, gram, bits)[0] for bits in (8, 4))]
    least, eight, four = relative_errors(weight, candidates, gram)
    assert eight < least * 1.01
    assert eight < four < least * 2.5


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_the_result_packs_without_loss(problem: Any, values: str, pattern: str) -> None:
    chosen = Pattern.parse(pattern)
    weight, gram = problem(6, 136)
    pruned = refit(weight, METHODS["wanda"](weight, gram, chosen), gram)
    found, scale = quantise(weight, pruned, gram, int(values[3:]))
    packed = pack(found, chosen, values, scale, mask_OI=pruned != 0)
    assert torch.equal(packed.dense(), found)


def test_kept_zeros_may_move_under_an_explicit_mask(problem: Any) -> None:
    weight, gram = problem(4, 16)
    mask = TWO_FOUR.mask(weight.abs())
    pruned = refit(weight, weight * mask, gram, 30)
    pruned[0, :4] = 0
    found, _ = quantise(weight, pruned, gram, 8, mask_OI=mask)
    assert found[0, :4].any() and not found[~mask].any()
    fixed, _ = quantise(weight, pruned, gram, 8)
    assert not fixed[0, :4].any()


def test_trained_values_are_kept_to(problem: Any) -> None:
    weight, gram = problem(8, 64)
    trained = weight * TWO_FOUR.mask(weight.abs()) + 0
    near = quantise(trained, trained, gram, 8)[0]
    away = quantise(weight, trained, gram, 8)[0]
    assert (near - trained).abs().max() < 0.1 * (away - trained).abs().max()


def test_empty_groups_and_dead_columns(problem: Any) -> None:
    weight, gram = problem(4, 256)
    gram[:, 7] = gram[7, :] = 0
    pruned = weight * TWO_FOUR.mask(weight.abs())
    pruned[2] = 0
    pruned[3, :128] = 0
    found, scale = quantise(weight, pruned, gram, 4)
    assert found.isfinite().all()
    assert scale[2].tolist() == [1, 1] and scale[3, 0] == 1
    assert not found[2].any()
    blind, _ = quantise(weight, pruned, torch.zeros_like(gram), 8)
    assert relative_errors(pruned, [blind], torch.eye(256))[0] < 1e-3


@pytest.mark.parametrize("bits", [1, 3, 16])
def test_other_widths_are_refused(problem: Any, bits: int) -> None:
    weight, gram = problem(2, 8)
    with pytest.raises(InputError, match=f"bits must be one of 4, 8, but it is {bits}"):
        quantise(weight, weight, gram, bits)
