"""What 2:4, 0.5 and dense mean."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from moiety.errors import InputError
from moiety.experts import Pattern
from moiety.experts.pattern import highest

HALF = Pattern.unstructured(0.5)
PATTERNS = st.sampled_from(
    [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(1, 2), Pattern(3, 7), Pattern(20, 32)]
)
DENSITIES = st.floats(0.01, 0.99)


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


@given(DENSITIES, st.integers(1, 9), st.integers(1, 40), st.integers(0, 1000))
def test_a_density_keeps_exactly_its_count(
    density: float, rows: int, columns: int, seed: int
) -> None:
    pattern = Pattern.unstructured(density)
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    kept = pattern.kept_columns(columns)
    assert kept == max(1, round(density * columns))
    by_row, by_matrix = pattern.mask(score), pattern.mask(score, within="matrix")
    assert (by_row.sum(1) == kept).all()
    assert int(by_matrix.sum()) == kept * rows == pattern.values_shape(rows, columns)[0]
    for mask, parts in ((by_row, range(rows)), (by_matrix, [slice(None)])):
        for part in parts:
            kept_scores, others = score[part][mask[part]], score[part][~mask[part]]
            assert not others.numel() or kept_scores.min() >= others.max()
        assert pattern.holds(score * mask)


@given(PATTERNS | DENSITIES.map(Pattern.unstructured), st.integers(1, 5), st.integers(0, 99))
def test_coarse_scores_with_many_ties_keep_the_exact_count(
    pattern: Pattern, rows: int, seed: int
) -> None:
    columns = 2 * pattern.group or 37
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 3, (rows, columns), generator=generator)
    for typed in (score, score.float(), score.to(torch.uint8), -score.bfloat16()):
        for mask in (pattern.mask(typed), pattern.mask(typed, within="matrix")):
            assert int(mask.sum()) == pattern.kept_columns(columns) * rows


def test_ties_keep_the_lower_columns_then_rows() -> None:
    even = torch.ones(2, 8)
    assert Pattern(2, 4).mask(even).tolist() == [[True, True, False, False] * 2] * 2
    assert Pattern(20, 32).mask(torch.ones(1, 32)).tolist() == [[True] * 20 + [False] * 12]
    assert HALF.mask(even).tolist() == [[True] * 4 + [False] * 4] * 2
    assert HALF.mask(even, within="matrix").tolist() == [[True] * 8, [False] * 8]


def test_dense_keeps_all() -> None:
    dense = Pattern.dense()
    assert dense.is_dense and dense.density == 1 and dense.kept_columns(7) == 7
    assert dense.mask(torch.zeros(2, 7)).all()
    assert dense.holds(torch.ones(2, 7))
    assert dense.values_shape(2, 7) == (14,)


def test_a_density_can_be_wanted_within_rows_or_the_matrix() -> None:
    score = torch.tensor([[9.0, 8, 7, 6], [1, 2, 3, 4]])
    assert HALF.mask(score).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert HALF.mask(score, within="matrix").tolist() == [[True] * 4, [False] * 4]


def test_a_tiny_density_keeps_one() -> None:
    assert Pattern.unstructured(0.001).mask(torch.rand(3, 10)).sum(1).tolist() == [1, 1, 1]


@given(st.integers(1, 6), st.integers(1, 30), st.data())
def test_highest_is_a_stable_sort(rows: int, columns: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, columns))
    values = st.lists(st.integers(-2, 2), min_size=columns, max_size=columns)
    score = torch.tensor(data.draw(st.lists(values, min_size=rows, max_size=rows)))
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :kept]
    expected = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(highest(score, kept), expected)


def test_holds_counts_in_groups_or_in_the_matrix() -> None:
    weight = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 1]])
    assert not Pattern(2, 4).holds(weight)
    assert not Pattern(2, 4).holds(torch.zeros(1, 6))
    assert HALF.holds(weight)
    assert HALF.holds(torch.cat([torch.ones(1, 8), torch.zeros(1, 8)]))
    assert not HALF.holds(torch.ones(1, 8))


@pytest.mark.parametrize(
    ("text", "pattern", "shown"),
    [
        ("2:4", Pattern(2, 4), "2:4"),
        (" 2 : 4 ", Pattern(2, 4), "2:4"),
        ("0.5", HALF, "0.5"),
        ("50%", HALF, "0.5"),
        (" 50 % ", HALF, "0.5"),
        (".25", Pattern.unstructured(0.25), "0.25"),
        ("12.5%", Pattern.unstructured(0.125), "0.125"),
        ("dense", Pattern.dense(), "dense"),
    ],
)
def test_parse(text: str, pattern: Pattern, shown: str) -> None:
    assert Pattern.parse(text) == pattern
    assert str(pattern) == shown
    assert Pattern.parse(shown) == pattern


@pytest.mark.parametrize(
    "text",
    ["", "2", "4:2", "0:4", "4:4", "2:0", "a:b", "2:4:8", "-2:4", "0", "0%", "1", "1.0", "100%"],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(InputError, match="pattern"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["150%", "-0.5", "nan", "half", "2:4%", "Dense", "0.5.0"])
def test_parse_refuses_what_is_no_share(text: str) -> None:
    with pytest.raises(InputError, match="pattern"):
        Pattern.parse(text)


@pytest.mark.parametrize(("kept", "group", "share"), [(2, 4, 0.5), (0, 0, 0), (2, 0, 0.5)])
def test_half_stated_patterns_are_refused(kept: int, group: int, share: float) -> None:
    with pytest.raises(InputError, match="pattern must keep"):
        Pattern(kept, group, share)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_densities_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(InputError, match="more than 0 and at most all"):
        Pattern.unstructured(share)


def test_width_must_fall_into_groups() -> None:
    with pytest.raises(InputError, match="multiple of 4"):
        Pattern(2, 4).mask(torch.rand(2, 6))
    assert Pattern.unstructured(0.5).kept_columns(7) == 4


def test_values_shapes() -> None:
    assert Pattern(2, 4).values_shape(3, 8) == (3, 4)
    assert Pattern(3, 7).values_shape(2, 14) == (2, 6)
    assert HALF.values_shape(3, 9) == (12,)
