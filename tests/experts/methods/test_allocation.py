"""OWL: shares of outliers, and densities that average to what was asked for."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from moiety.errors import InputError
from moiety.experts.methods import outlier_share, owl_densities

SHARES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12)


def test_outlier_share_counts_scores_over_the_blocks_mean() -> None:
    plain, spiked = torch.ones(4, 8), torch.ones(4, 8)
    spiked[0, 0] = 1000
    gram = torch.eye(8)
    assert outlier_share([(plain, gram)]) == 0
    assert outlier_share([(spiked, gram)]) == 1 / 32
    assert outlier_share([(plain, gram), (spiked, gram)]) == 1 / 64
    assert outlier_share([(plain, gram), (10 * plain, gram)], multiple=1.5) == 0.5


def test_outliers_may_be_in_the_inputs() -> None:
    gram = torch.eye(8)
    gram[2, 2] = 1e6
    assert outlier_share([(torch.ones(4, 8), gram)]) == 1 / 8


def test_densities_are_the_papers() -> None:
    assert owl_densities([1, 3, 2], 0.5) == pytest.approx([0.42, 0.58, 0.5])
    assert owl_densities([0, 0, 0.3], 0.3, 0.1) == pytest.approx(
        [0.3 - 0.2 / 3] * 2 + [0.3 + 0.4 / 3]
    )
    assert owl_densities([5, 5], 0.7) == pytest.approx([0.7, 0.7])
    assert owl_densities([5], 1) == pytest.approx([1])


@given(SHARES, st.floats(0.01, 1), st.floats(0, 0.6), st.integers(0, 99))
def test_the_mean_is_kept_and_the_order_too(
    shares: list[float], density: float, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 100, (len(shares),), generator=generator).tolist()
    found = owl_densities(shares, density, spread, sizes)
    assert all(0 < d <= 1 for d in found)
    mean = sum(d * size for d, size in zip(found, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(density, abs=1e-9)
    ranked = sorted(range(len(shares)), key=lambda block: shares[block])
    assert all(found[a] <= found[b] + 1e-12 for a, b in pairwise(ranked))
    assert max(found) - min(found) <= 2 * spread + 1e-9


def test_nonsense_is_refused() -> None:
    with pytest.raises(InputError, match="density over 0"):
        owl_densities([1, 2], 0)
    with pytest.raises(InputError, match="spread of at least 0"):
        owl_densities([1, 2], 0.5, -0.1)
    with pytest.raises(InputError, match="1 for 2 blocks"):
        owl_densities([1, 2], 0.5, sizes=[3])
    with pytest.raises(InputError, match="0 for 0 blocks"):
        owl_densities([], 0.5)
    with pytest.raises(InputError, match="at least one matrix"):
        outlier_share([])
