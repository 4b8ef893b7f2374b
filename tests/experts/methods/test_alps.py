"""ALPS: better masks than SparseGPT's, and the refit's values for them."""

from typing import Any

import pytest

from moiety.experts import Pattern
from moiety.experts.methods import alps, refit, relative_errors, sparsegpt


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "0.5", "0.2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_errs_less_than_sparsegpt_with_refit(problem: Any, pattern: str, seed: int) -> None:
    chosen = Pattern.parse(pattern)
    weight, gram = problem(40, 96, seed)
    other = refit(weight, sparsegpt(weight, gram, chosen), gram, 30)
    ours, theirs = relative_errors(weight, [alps(weight, gram, chosen), other], gram)
    assert ours < 0.97 * theirs


def test_its_values_are_refitted(problem: Any) -> None:
    weight, gram = problem(16, 64)
    pruned = alps(weight, gram, Pattern(2, 4))
    again = refit(weight, pruned, gram, 40)
    found, best = relative_errors(weight, [pruned, again], gram)
    assert found < best * 1.02


def test_a_density_may_spread_unevenly_over_rows(problem: Any) -> None:
    weight, gram = problem(8, 32)
    weight[0] *= 10
    pruned = alps(weight, gram, Pattern.unstructured(0.5))
    counts = (pruned != 0).sum(1)
    assert int(counts.sum()) == 8 * 16
    assert counts[0] > counts[1:].max()
