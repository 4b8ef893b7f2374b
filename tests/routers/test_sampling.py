"""Batches with the same number of windows of every text."""

from collections import Counter
from types import ModuleType

import torch
from hypothesis import given
from hypothesis import strategies as st

from moiety.routers.sampling import (
    SWITCHING,
    EqualDomains,
    LabelledWindows,
    labelled_texts,
)


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


def test_texts_of_different_lengths_are_padded(toys: ModuleType) -> None:
    data = {"law": toys.windows(1, 2, length=6), "code": toys.windows(2, 3, length=9)}
    windows = LabelledWindows(labelled_texts(data, toys.OWN, False, 0))
    assert windows.sizes == [2, 3] and len(windows) == 5
    assert windows.ids_WC.shape == windows.mask_WC.shape == windows.own_WC.shape == (5, 9)
    assert torch.equal(windows.ids_WC[:2, :6], data["law"].ids_WC)
    assert not windows.mask_WC[:2, 6:].any()
    owners = torch.tensor([2, 2, 0, 0, 0])[:, None].expand(5, 9)
    assert torch.equal(windows.own_WC, owners.masked_fill(windows.mask_WC == 0, -1))


def test_text_that_switches_is_one_more_where_there_are_two_experts(toys: ModuleType) -> None:
    data = {"law": toys.windows(1, 2), "code": toys.windows(2, 3)}
    texts = labelled_texts(data, toys.OWN, True, 0)
    assert list(texts) == ["law", "code", SWITCHING]
    assert len(texts[SWITCHING]) == 3
    assert all(len(own_C.unique()) == 2 for own_C in texts[SWITCHING].own_WC)
    assert list(labelled_texts(data, {"law": 1, "code": 1}, True, 0)) == ["law", "code"]
