"""What 2:4 means."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from moiety.errors import InputError
from moiety.experts import Pattern

PATTERNS = st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(1, 2)])


@given(PATTERNS, st.integers(1, 9), st.integers(1, 6), st.integers(0, 1000))
def test_every_group_keeps_exactly_its_best(
    pattern: Pattern, rows: int, groups: int, seed: int
) -> None:
    torch.manual_seed(seed)
    score = torch.rand(rows, groups * pattern.group)
    mask = pattern.mask(score)
    grouped, scores = mask.view(rows, groups, -1), score.view(rows, groups, -1)
    assert (grouped.sum(-1) == pattern.kept).all()
    worst_kept = scores.masked_fill(~grouped, 2).amin(-1)
    best_dropped = scores.masked_fill(grouped, -1).amax(-1)
    assert (worst_kept >= best_dropped).all()
    assert pattern.holds(score * mask)


def test_ties_keep_the_lower_columns() -> None:
    mask = Pattern(2, 4).mask(torch.ones(1, 8))
    assert mask.tolist() == [[True, True, False, False] * 2]


def test_holds_counts_in_groups_not_in_rows() -> None:
    weight = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 1]])
    assert not Pattern(2, 4).holds(weight)
    assert not Pattern(2, 4).holds(torch.zeros(1, 6))


@pytest.mark.parametrize("text", ["2:4", " 2 : 4 "])
def test_parse(text: str) -> None:
    assert Pattern.parse(text) == Pattern(2, 4)
    assert str(Pattern.parse(text)) == "2:4"


@pytest.mark.parametrize("text", ["", "2", "4:2", "0:4", "4:4", "a:b", "2:4:8", "-2:4"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(InputError, match="pattern"):
        Pattern.parse(text)


def test_width_must_fall_into_groups() -> None:
    with pytest.raises(InputError, match="multiple of 4"):
        Pattern(2, 4).mask(torch.rand(2, 6))
