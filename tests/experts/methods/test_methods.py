"""What every pruning method promises, and how they compare."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from moiety.errors import InputError
from moiety.experts import Pattern
from moiety.experts.methods import (
    METHODS,
    output_energy,
    quantise,
    refit,
    relative_error,
    relative_errors,
)

TWO_FOUR = Pattern(2, 4)
GROUPED = [Pattern(*counts) for counts in ((2, 4), (1, 4), (4, 8), (1, 2), (3, 5), (20, 32))]
DENSITIES = [Pattern.unstructured(density) for density in (0.5, 0.31, 0.04, 0.97)]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(METHODS)),
    st.sampled_from([*GROUPED, *DENSITIES]),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 50),
)
def test_every_method_keeps_exactly_the_pattern(
    problem: Any, method: str, pattern: Pattern, rows: int, groups: int, seed: int
) -> None:
    columns = groups * pattern.group or 16 * groups + seed % 7
    weight, gram = problem(rows, columns, seed)
    before = weight.clone(), gram.clone()
    pruned = METHODS[method](weight, gram, pattern)
    assert pruned.dtype == torch.float32 and pruned.shape == weight.shape
    assert pattern.holds(pruned)
    assert int(pruned.count_nonzero()) == pattern.kept_columns(columns) * rows
    assert torch.equal(pruned, METHODS[method](weight, gram, pattern))
    better = refit(weight, pruned, gram)
    assert not better[pruned == 0].any()
    worse, least = relative_errors(weight, [pruned, better], gram)
    assert least <= worse * (1 + 1e-4) + 1e-6
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_dense_keeps_everything(problem: Any, method: str) -> None:
    weight, gram = problem(5, 12)
    pruned = METHODS[method](weight, gram, Pattern.dense())
    assert torch.equal(pruned, weight)
    pruned[0, 0] = 7
    assert weight[0, 0] != 7


@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern.unstructured(0.5)], ids=str)
def test_better_methods_err_less(problem: Any, pattern: Pattern) -> None:
    weight, gram = problem(64, 128)
    pruned = {name: method(weight, gram, pattern) for name, method in METHODS.items()}
    error = {name: relative_error(weight, matrix, gram) for name, matrix in pruned.items()}
    refitted = relative_error(weight, refit(weight, pruned["sparsegpt"], gram), gram)
    assert error["alps"] < refitted < error["sparsegpt"] < error["wanda"]
    assert max(error["wanda"], error["ria"]) < error["magnitude"]


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern.unstructured(0.5)], ids=str)
def test_columns_that_never_fire_are_finite(problem: Any, method: str, pattern: Pattern) -> None:
    weight, gram = problem(8, 16)
    gram[:, 5] = gram[5, :] = 0
    pruned = METHODS[method](weight, gram, pattern)
    assert refit(weight, pruned, gram).isfinite().all()
    assert pattern.holds(pruned)
    if method in ("sparsegpt", "alps"):
        assert not pruned[:, 5].any()


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern.unstructured(0.5)], ids=str)
def test_zero_gram_leaves_nothing_but_zeros(method: str, pattern: Pattern) -> None:
    assert not METHODS[method](torch.randn(3, 8), torch.zeros(8, 8), pattern).any()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_rank_deficient_gram(problem: Any, method: str) -> None:
    weight, _ = problem(8, 32)
    inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    gram = inputs.T @ inputs
    pruned = METHODS[method](weight, gram, TWO_FOUR)
    better = refit(weight, pruned, gram)
    assert better.isfinite().all()
    worse, least = relative_errors(weight, [pruned, better], gram)
    assert least <= worse + 1e-6
    assert least < 1e-4


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt", "alps"])
def test_nan_activations_are_refused(problem: Any, method: str) -> None:
    weight, gram = problem(4, 8)
    gram[3, :] = gram[:, 3] = float("nan")
    with pytest.raises(InputError, match="finite calibration activations"):
        METHODS[method](weight, gram, TWO_FOUR)
    with pytest.raises(InputError, match="finite calibration activations"):
        refit(weight, weight, gram)
    with pytest.raises(InputError, match="finite calibration activations"):
        quantise(weight, weight, gram, 8)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_wrong_types_and_shapes_are_refused(problem: Any, method: str) -> None:
    weight, gram = problem(4, 8)
    with pytest.raises(InputError, match=r"fp32 weight.*bfloat16"):
        METHODS[method](weight.bfloat16(), gram, TWO_FOUR)
    with pytest.raises(InputError, match=r"fp32 Gram matrix.*float64"):
        METHODS[method](weight, gram.double(), TWO_FOUR)
    with pytest.raises(InputError, match=r"\(4, 8\) and \(4, 4\)"):
        METHODS[method](weight, gram[:4, :4], TWO_FOUR)
    with pytest.raises(InputError, match="multiple of 3"):
        METHODS[method](weight, gram, Pattern(1, 3))


def test_magnitude_and_ria_compare_whole_matrices_and_wanda_rows(problem: Any) -> None:
    weight, gram = problem(6, 20)
    weight[0] *= 100
    half = Pattern.unstructured(0.5)
    assert (METHODS["wanda"](weight, gram, half) != 0).sum(1).eq(10).all()
    assert (METHODS["magnitude"](weight, gram, half)[0] != 0).all()
    assert (METHODS["ria"](weight, gram, half) != 0).sum(1).ne(10).any()


def test_ria_is_its_formula(problem: Any) -> None:
    weight, gram = problem(6, 8)
    score = torch.empty_like(weight)
    for row in range(6):
        for column in range(8):
            size = weight[row, column].abs()
            share = size / weight[:, column].abs().sum() + size / weight[row].abs().sum()
            score[row, column] = share * gram[column, column] ** 0.25
    expected = weight * TWO_FOUR.mask(score)
    torch.testing.assert_close(METHODS["ria"](weight, gram, TWO_FOUR), expected)


def test_errors_share_one_total(problem: Any) -> None:
    weight, gram = problem(5, 12)
    assert relative_errors(weight, [weight, 0 * weight], gram) == [0, pytest.approx(1)]
    half = relative_error(weight, weight / 2, gram)
    assert half == pytest.approx(0.25)
    assert output_energy(weight, gram) == pytest.approx(
        float((weight.double() @ gram.double() @ weight.T.double()).trace())
    )
    assert relative_errors(weight, [weight, 0 * weight], 0 * gram) == [0, 0]
