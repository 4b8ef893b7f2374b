"""Batches with the same number of windows of every domain."""

from collections import Counter
from types import ModuleType

import torch
from hypothesis import given
from hypothesis import strategies as st

from moiety.routers.sampling import EqualDomains, LabelledWindows


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(0, 12),
)
def test_every_batch_is_equal_and_any_start_gives_the_same(
    sizes: list[int], per_domain: int, seed: int, start: int
) -> None:
    whole = list(EqualDomains(sizes, per_domain, seed, 0, 12))
    assert list(EqualDomains(sizes, per_domain, seed, start, 12)) == whole[start:]
    firsts = [sum(sizes[:domain]) for domain in range(len(sizes))]
    for rows in whole:
        owners = Counter(max(at for at, first in enumerate(firsts) if row >= first) for row in rows)
        assert owners == dict.fromkeys(range(len(sizes)), per_domain)


@given(st.integers(1, 9), st.integers(0, 5))
def test_a_domain_is_used_up_before_it_repeats(size: int, seed: int) -> None:
    rows = [row for batch in EqualDomains([size], 1, seed, 0, 3 * size) for row in batch]
    for epoch in range(3):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_windows_of_different_lengths_are_padded(toys: ModuleType) -> None:
    data = {"law": toys.windows(1, 2, length=6), "code": toys.windows(2, 3, length=9)}
    windows = LabelledWindows(data, toys.OWN)
    assert windows.ids_WC.shape == windows.mask_WC.shape == (5, 9)
    assert windows.own_W.tolist() == [2, 2, 0, 0, 0]
    assert torch.equal(windows.ids_WC[:2, :6], data["law"].ids_WC)
    assert not windows.mask_WC[:2, 6:].any()
