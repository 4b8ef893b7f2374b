"""SparseGPT by halves against the published loop over columns, in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.experts import Pattern
from moiety.experts.methods import relative_error, sparsegpt
from moiety.experts.methods.sweep import surgeon_coupling


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Tensor:
    """The published factor: upper Cholesky factor of the inverse of the damped Gram matrix."""
    hessian = gram.double()
    hessian.diagonal().mul_(1 + damping)
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def column_by_column(weight: Tensor, gram: Tensor, pattern: Pattern | Tensor) -> Tensor:
    """SparseGPT as the paper writes it; a mask in place of a pattern is taken as it is."""
    weight, factor = weight.double(), inverse_factor(gram)
    group = pattern.group if isinstance(pattern, Pattern) else weight.shape[1]
    mask = torch.empty(0)
    for column in range(weight.shape[1]):
        if column % group == 0:
            span = slice(column, column + group)
            score = (weight[:, span] / factor.diagonal()[span]).square()
            mask = pattern.mask(score.float()) if isinstance(pattern, Pattern) else pattern
        kept = weight[:, column] * mask[:, column % group]
        error = (weight[:, column] - kept) / factor[column, column]
        weight[:, column] = kept
        weight[:, column + 1 :] -= torch.outer(error, factor[column, column + 1 :])
    return weight.float()


@pytest.mark.parametrize("columns", [4, 36, 128, 260])
def test_two_four_equals_the_paper(problem: Any, columns: int) -> None:
    weight, gram = problem(17, columns)
    pruned = sparsegpt(weight, gram, Pattern(2, 4))
    expected = column_by_column(weight, gram, Pattern(2, 4))
    torch.testing.assert_close(pruned, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("counts", [(1, 2), (1, 4), (2, 5), (4, 8), (5, 16), (16, 32), (32, 64)])
def test_any_group_equals_the_paper(problem: Any, counts: tuple[int, int]) -> None:
    pattern = Pattern(*counts)
    weight, gram = problem(9, 3 * pattern.group)
    expected = column_by_column(weight, gram, pattern)
    torch.testing.assert_close(sparsegpt(weight, gram, pattern), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.9])
def test_a_density_updates_as_the_paper_does(problem: Any, density: float) -> None:
    weight, gram = problem(9, 75)
    pruned = sparsegpt(weight, gram, Pattern.unstructured(density))
    expected = column_by_column(weight, gram, pruned != 0)
    torch.testing.assert_close(pruned, expected, rtol=1e-3, atol=1e-4)


def test_a_density_errs_less_than_a_pattern(problem: Any) -> None:
    weight, gram = problem(32, 96)
    free = sparsegpt(weight, gram, Pattern.unstructured(0.5))
    grouped = sparsegpt(weight, gram, Pattern(2, 4))
    assert relative_error(weight, free, gram) < relative_error(weight, grouped, gram)


def test_ties_go_to_the_lower_column() -> None:
    pruned = sparsegpt(torch.ones(2, 8), torch.eye(8), Pattern(2, 4))
    assert pruned[0].tolist() == [1, 1, 0, 0] * 2


def test_dead_columns_count_as_independent(problem: Any) -> None:
    weight, gram = problem(6, 12)
    gram[:, 7] = gram[7, :] = 0
    alive = [column for column in range(12) if column != 7]
    whole = sparsegpt(weight, gram, Pattern.unstructured(0.999))
    assert not whole[:, 7].any()
    coupling, _ = surgeon_coupling(gram, 0.01)
    assert not coupling[7, 8:].any() and not coupling[:7, 7].any()
    smaller, _ = surgeon_coupling(gram[alive][:, alive], 0.01)
    torch.testing.assert_close(coupling[alive][:, alive], smaller)


def test_a_few_huge_channels_do_not_drown_the_others(problem: Any) -> None:
    weight, gram = problem(32, 96)
    huge = torch.ones(96)
    huge[[7, 40]] = 1000
    plain = sparsegpt(weight, gram, Pattern(2, 4))
    scaled = sparsegpt(weight / huge, gram * huge * huge[:, None], Pattern(2, 4)) * huge
    torch.testing.assert_close(scaled, plain, rtol=1e-2, atol=1e-2)


def test_coupling_is_the_inverse_factor_turned_round(problem: Any) -> None:
    _, gram = problem(1, 24)
    coupling, price = surgeon_coupling(gram, 0.01)
    factor = (coupling * price).double()
    identity = factor.triu() @ inverse_factor(gram)
    torch.testing.assert_close(identity, torch.eye(24).double(), rtol=0, atol=1e-4)


def test_singular_gram_is_damped_and_a_hopeless_one_refused() -> None:
    ones = torch.ones(8, 8) * 1e6
    coupling, price = surgeon_coupling(ones, 1e-9)
    assert coupling.isfinite().all() and (price > 0).all()
    with pytest.raises(InputError, match="damping makes positive definite"):
        surgeon_coupling(torch.eye(4) - 2 * torch.ones(4, 4).fill_diagonal_(0), 1e-6)
