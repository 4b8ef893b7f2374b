"""bf16 in twelve bits: every bit comes back, whatever the values, and products are those of bf16."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moiety.experts import kernels
from moiety.experts.kernels import Weights, reference
from moiety.experts.kernels.library import Isa, library
from moiety.experts.kernels.weights import BF12

pytestmark = pytest.mark.usefixtures("compiled")
SUPPORTED = [isa for isa in Isa if (found := library()) is not None and isa in found.supported]


def stored(packs: Any, count: int, rows: int, columns: int) -> Weights:
    torch.manual_seed(0)
    _, values, mask, _ = packs.stacked(count, rows, columns, "2:4", "bf16")
    return kernels.packed(values, mask, columns)


def with_values(weights: Weights, row: int, first: int, values: Tensor) -> Weights:
    """The same with other values in one row of every second matrix."""
    changed = weights.values.clone()
    changed[::2, row, first : first + len(values)] = values.bfloat16()
    return weights._replace(values=changed)


def assert_same(weights: Weights, kind: str) -> Weights:
    tiles = kernels.tiled(weights)
    assert tiles is not None and tiles.kind == kind
    again = kernels.untiled(tiles)
    assert again.kind == "bf16" and again.mask is not None and weights.mask is not None
    assert torch.equal(again.values.view(torch.int16), weights.values.view(torch.int16))
    assert torch.equal(again.mask, weights.mask)
    for which in range(weights.stack):
        dense = reference.expand(weights.values[which], weights.mask[which], weights.columns, None)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(kernels.dense(tiles, which, dtype), dense.to(dtype))
            assert torch.equal(kernels.dense(tiles.one(which), 0, dtype), dense.to(dtype))
    return tiles


def assert_multiplied(weights: Weights, tiles: Weights) -> None:
    """As the same numbers in fp32 are, whose tiles hold them as they are."""
    compiled = library()
    assert compiled is not None and weights.mask is not None
    plain = kernels.tiled(kernels.packed(weights.values.float(), weights.mask, weights.columns))
    assert plain is not None
    for isa in SUPPORTED:
        for tokens in (1, 3, 8, 20, 70, 130):
            input = torch.randn(tokens, weights.columns)
            for which in range(weights.stack):
                ours = compiled.forward(input, tiles.one(which), isa=isa)
                assert torch.equal(ours, compiled.forward(input, plain.one(which), isa=isa))
                halves = compiled.forward(input.bfloat16(), tiles.one(which), isa=isa)
                wide = input.bfloat16().float()
                exact = compiled.forward(wide, plain.one(which), isa=Isa.PORTABLE)
                assert (halves.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (17, 36), (70, 260), (50, 1028)])
def test_usual_weights_take_twelve_bits(packs: Any, rows: int, columns: int) -> None:
    weights = stored(packs, 3, rows, columns)
    tiles = assert_same(weights, BF12)
    assert tiles.values.shape == (3, -(-rows // 16) * (192 + -(-columns // 32) * 448))
    assert_multiplied(weights, tiles)


def test_zeros_of_both_signs_and_subnormal_numbers_are_kept(packs: Any) -> None:
    odd = torch.tensor([0.0, -0.0, 1e-39, -1e-39, 9e-41])
    weights = with_values(stored(packs, 2, 20, 64), 3, 7, odd)
    assert_multiplied(weights, assert_same(weights, BF12))


@pytest.mark.parametrize("row", [0, 15, 16, 69])
def test_chunks_with_rare_exponents_are_kept_apart(packs: Any, row: int) -> None:
    weights = stored(packs, 3, 70, 260)
    for first, exponent in ((40, -70), (100, 60)):
        powers = 2.0 ** torch.arange(exponent, exponent + 6)
        weights = with_values(weights, row, first, -powers)
    tiles = assert_same(weights, BF12)
    assert tiles.values.shape[1] == 5 * (192 + 9 * 448) + 2 * 640
    assert_multiplied(weights, tiles)


def test_weights_with_too_many_exponents_stay_as_they_are(packs: Any) -> None:
    weights = stored(packs, 2, 70, 260)
    for row in range(3):
        weights = with_values(weights, row, 0, 2.0 ** -torch.arange(20.0 + row, 44.0 + row, 3))
    assert_same(weights, "bf16")


@pytest.mark.parametrize("lowest", [100, 101])
def test_sixteen_exponents_are_numbered_where_none_is_zero(packs: Any, lowest: int) -> None:
    """Beginning with an even or an odd one, of both signs; a zero asks for a chunk of its own."""
    weights = stored(packs, 2, 16, 512)
    torch.manual_seed(0)
    exponents = torch.randint(lowest, lowest + 16, weights.values.shape).to(torch.int16)
    exponents[:, :, 16:32] = lowest  # a chunk that has room for a zero, but not in the tile's list
    mantissas = torch.randint(-128, 128, weights.values.shape).to(torch.int16) & 0x7F - 0x8000
    weights = weights._replace(values=(exponents << 7 | mantissas).view(torch.bfloat16))
    tiles = assert_same(weights, BF12)
    assert tiles.values.shape[1] == 192 + 16 * 448
    assert_multiplied(weights, tiles)
    tiles = assert_same(with_values(weights, 3, 20, torch.zeros(1)), BF12)
    assert tiles.values.shape[1] == 192 + 16 * 448 + 640


@given(st.lists(st.integers(0, 0x7F7F), min_size=64, max_size=64), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_any_bits_come_back(bits: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (64,), generator=generator) * -0x8000
    values = (torch.tensor(bits) + signs).to(torch.int16).view(torch.bfloat16)
    mask = torch.full((4, 4), 0x5A, dtype=torch.uint8)
    weights = kernels.packed(values.reshape(4, 16), mask, 32)
    tiles = kernels.tiled(weights)
    assert tiles is not None
    again = kernels.untiled(tiles)
    assert torch.equal(again.values.view(torch.int16), weights.values.view(torch.int16))
