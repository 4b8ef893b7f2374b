"""The refit against exact least squares, and what it does at the edges."""

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.experts import Pattern
from moiety.experts.methods import Method, magnitude, refit, relative_error, sparsegpt, wanda

TWO_FOUR = Pattern(2, 4)
refit_module = importlib.import_module("moiety.experts.methods.refit")


def least_squares(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """The best values for a mask, row by row in fp64."""
    exact = torch.zeros_like(weight, dtype=torch.float64)
    gram = gram.double()
    for row, kept in enumerate(mask):
        right = (gram[kept] @ weight[row].double())[:, None]
        exact[row, kept] = torch.linalg.lstsq(gram[kept][:, kept], right).solution[:, 0]
    return exact.float()


@pytest.mark.parametrize("columns", [4, 24, 96])
def test_it_converges_to_least_squares(problem: Any, columns: int) -> None:
    weight, gram = problem(5, columns)
    pruned = wanda(weight, gram, TWO_FOUR)
    exact = least_squares(weight, pruned != 0, gram)
    torch.testing.assert_close(refit(weight, pruned, gram, 80), exact, rtol=5e-2, atol=5e-2)
    best = relative_error(weight, exact, gram)
    assert relative_error(weight, refit(weight, pruned, gram, 80), gram) < best * 1.001


@pytest.mark.parametrize("method", [magnitude, wanda, sparsegpt])
def test_default_steps_get_almost_all_of_the_gain(problem: Any, method: Method) -> None:
    weight, gram = problem(48, 256)
    pruned = method(weight, gram, TWO_FOUR)
    before = relative_error(weight, pruned, gram)
    best = relative_error(weight, least_squares(weight, pruned != 0, gram), gram)
    found = relative_error(weight, refit(weight, pruned, gram), gram)
    assert before - found > 0.95 * (before - best)


def test_more_steps_err_less(problem: Any) -> None:
    weight, gram = problem(16, 128)
    pruned = wanda(weight, gram, TWO_FOUR)
    errors = [
        relative_error(weight, refit(weight, pruned, gram, steps), gram) for steps in range(6)
    ]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(refit(weight, pruned, gram, 0), pruned)


def test_kept_zeros_move_under_an_explicit_mask(problem: Any) -> None:
    weight, gram = problem(6, 16)
    mask = TWO_FOUR.mask(weight.abs())
    start = weight * mask
    start[:, :8] = 0
    moved = refit(weight, start, gram, 60, mask_OI=mask)
    assert not moved[~mask].any()
    assert moved[:, :8][mask[:, :8]].all()
    torch.testing.assert_close(moved, refit(weight, weight * mask, gram, 60), rtol=1e-2, atol=1e-2)


def test_values_outside_the_mask_are_dropped(problem: Any) -> None:
    weight, gram = problem(6, 16)
    mask = TWO_FOUR.mask(weight.abs())
    assert not refit(weight, weight, gram, 1, mask_OI=mask)[~mask].any()


def test_the_optimum_stays(problem: Any) -> None:
    weight, gram = problem(4, 32)
    pruned = wanda(weight, gram, TWO_FOUR)
    exact = least_squares(weight, pruned != 0, gram)
    again = refit(weight, exact, gram, 20)
    torch.testing.assert_close(again, exact, rtol=1e-3, atol=1e-3)
    assert torch.equal(refit(weight, weight, gram), weight)


def test_rows_are_refitted_apart(problem: Any) -> None:
    weight, gram = problem(6, 64)
    pruned = wanda(weight, gram, TWO_FOUR)
    weight[2] *= 1e4
    pruned[2] *= 1e4
    whole = refit(weight, pruned, gram, 12)
    alone = refit(weight[3:4], pruned[3:4], gram, 12)
    torch.testing.assert_close(whole[3:4], alone, rtol=2e-2, atol=2e-2)


def test_empty_rows_and_dead_columns_are_left(problem: Any) -> None:
    weight, gram = problem(5, 16)
    gram[:, 3] = gram[3, :] = 0
    pruned = wanda(weight, gram, TWO_FOUR)
    pruned[1] = 0
    pruned[:, 3] = 1
    found = refit(weight, pruned, gram)
    assert not found[1, [0, 1, 2, *range(4, 16)]].any()
    assert torch.equal(found[:, 3], pruned[:, 3])


def test_wrong_types_are_refused(problem: Any) -> None:
    weight, gram = problem(4, 8)
    with pytest.raises(InputError, match="fp32 weight"):
        refit(weight.half(), weight, gram)


def test_products_in_bf16_find_the_same(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(32, 256)
    pruned = sparsegpt(weight, gram, TWO_FOUR)
    found = {}
    for fast in (False, True):
        monkeypatch.setattr(refit_module, "_has_fast_bf16", lambda _device, fast=fast: fast)
        monkeypatch.setattr(refit_module, "ROUGH_FROM", 1)
        found[fast] = refit(weight, pruned, gram)
    assert not torch.equal(found[True], found[False])
    exact, rough = (relative_error(weight, one, gram) for one in found.values())
    assert rough == pytest.approx(exact, rel=1e-3)
    assert not found[True][pruned == 0].any()


def test_bf16_holds_where_inputs_share_a_large_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1024, 256, generator=generator)
    inputs += 3 * torch.randn(256, generator=generator)
    inputs[:, 5] *= 1000
    weight, gram = torch.randn(32, 256, generator=generator), inputs.T @ inputs
    pruned = sparsegpt(weight, gram, TWO_FOUR)
    monkeypatch.setattr(refit_module, "_has_fast_bf16", lambda _device: False)
    exact = relative_error(weight, refit(weight, pruned, gram), gram)
    monkeypatch.setattr(refit_module, "_has_fast_bf16", lambda _device: True)
    monkeypatch.setattr(refit_module, "ROUGH_FROM", 1)
    found = refit(weight, pruned, gram)
    assert relative_error(weight, found, gram) == pytest.approx(exact, rel=1e-3)


def test_rows_that_bf16_would_spoil_stay_as_they_came(
    problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = problem(32, 256)
    pruned = sparsegpt(weight, gram, TWO_FOUR)
    inputs = refit_module._Inputs.of(gram)
    wrong = (torch.eye(256) / 256).bfloat16()
    monkeypatch.setattr(refit_module._Inputs, "of", lambda _gram: replace(inputs, rough_II=wrong))
    found = refit(weight, pruned, gram)

    def errors(candidate: Tensor) -> Tensor:
        return torch.linalg.vecdot((weight - candidate) @ gram, weight - candidate)

    assert (errors(found) <= errors(pruned) * (1 + 1e-5)).all()
    assert (found == pruned).all(dim=1).any()
