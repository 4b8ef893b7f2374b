"""Pruning methods against plain references and against each other."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moiety.errors import InputError
from moiety.experts import Pattern
from moiety.experts.methods import METHODS, refit, relative_error, sparsegpt, wanda
from moiety.experts.methods.sparsegpt import inverse_factor

TWO_FOUR = Pattern(2, 4)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs with channels of unequal size."""
    torch.manual_seed(seed)
    inputs = torch.randn(4 * columns, columns // 2) @ torch.randn(columns // 2, columns)
    inputs = (inputs + torch.randn(4 * columns, columns)) * torch.rand(columns).exp()
    return torch.randn(rows, columns), inputs.T @ inputs


def column_by_column(weight: Tensor, gram: Tensor, damping: float = 0.01) -> Tensor:
    """SparseGPT 2:4 as the paper writes it, one column at a time over the whole matrix."""
    weight, hessian = weight.clone(), gram.clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.linalg.inv(hessian.double())
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    mask = torch.empty(0)
    for j in range(weight.shape[1]):
        if j % 4 == 0:
            mask = TWO_FOUR.mask((weight[:, j : j + 4] / factor.diagonal()[j : j + 4]) ** 2)
        kept = weight[:, j] * mask[:, j % 4]
        error = (weight[:, j] - kept) / factor[j, j]
        weight[:, j] = kept
        weight[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    return weight


@pytest.mark.parametrize("columns", [4, 36, 128, 260])
def test_sparsegpt_equals_the_paper(columns: int) -> None:
    weight, gram = problem(17, columns)
    torch.testing.assert_close(
        sparsegpt(weight, gram, TWO_FOUR), column_by_column(weight, gram), rtol=1e-3, atol=1e-4
    )


def test_refit_is_the_exact_least_squares_solution() -> None:
    weight, gram = problem(5, 24)
    pruned = wanda(weight, gram, TWO_FOUR)
    found = refit(weight, pruned, gram, steps=60)
    for row in range(5):
        kept = pruned[row] != 0
        small, right = gram[kept][:, kept].double(), (gram[kept] @ weight[row]).double()
        exact = torch.linalg.solve(small, right).float()
        torch.testing.assert_close(found[row, kept], exact, rtol=2e-3, atol=2e-3)
        assert not found[row, ~kept].any()


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(sorted(METHODS)),
    st.sampled_from([(2, 4), (4, 8), (1, 4)]),
    st.integers(0, 50),
)
def test_every_method_follows_the_pattern_and_refit_never_hurts(
    method: str, counts: tuple[int, int], seed: int
) -> None:
    pattern = Pattern(*counts)
    weight, gram = problem(6, 24, seed)
    before = weight.clone(), gram.clone()
    pruned = METHODS[method](weight, gram, pattern)
    better = refit(weight, pruned, gram)
    assert pattern.holds(pruned) and pattern.holds(better)
    assert torch.equal(better != 0, (pruned != 0) & (better != 0))
    assert relative_error(weight, better, gram) <= relative_error(weight, pruned, gram) + 1e-6
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


def test_better_methods_err_less() -> None:
    weight, gram = problem(64, 128)
    errors = {m: relative_error(weight, METHODS[m](weight, gram, TWO_FOUR), gram) for m in METHODS}
    refitted = refit(weight, sparsegpt(weight, gram, TWO_FOUR), gram)
    assert relative_error(weight, refitted, gram) < errors["sparsegpt"] < errors["wanda"]
    assert errors["wanda"] < errors["magnitude"]


def test_columns_that_never_fire_are_dropped() -> None:
    weight, gram = problem(8, 16)
    gram[:, 5] = gram[5, :] = 0
    pruned = refit(weight, sparsegpt(weight, gram, TWO_FOUR), gram)
    assert not pruned[:, 5].any()
    assert pruned.isfinite().all()


def test_singular_gram_is_damped_and_nan_refused() -> None:
    ones = torch.ones(8, 8) * 1e6
    assert inverse_factor(ones, 1e-9).isfinite().all()
    ones[0, 0] = float("nan")
    with pytest.raises(InputError, match="finite calibration activations"):
        inverse_factor(ones, 0.01)


def test_zero_gram_leaves_nothing_but_zeros() -> None:
    pruned = sparsegpt(torch.randn(3, 8), torch.zeros(8, 8), TWO_FOUR)
    assert not pruned.any()
