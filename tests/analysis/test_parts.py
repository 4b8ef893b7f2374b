"""Planted effects are recovered, nothing is found where there is nothing, peers agree."""

import dataclasses
from typing import Any

import numpy
import pytest
from scipy.stats import contingency, permutation_test
from sklearn.metrics import (
    adjusted_mutual_info_score,
    mutual_info_score,
    normalized_mutual_info_score,
)

from moiety.analysis import compare, summarise
from moiety.analysis.results import Comparison, RoutingSummary, from_dict, to_dict
from moiety.analysis.results_tables import comparison_tables
from moiety.analysis.statistics.measures import (
    cramers_v_squared,
    matched,
    matched_share,
    mutual_information,
    table_information,
)
from moiety.analysis.statistics.pairs import coactivation, flow
from moiety.analysis.statistics.resampling import Documents, Draws, measure
from moiety.analysis.trace import Trace
from moiety.errors import InputError
from tests.analysis.planted import known_information, planted_trace

FAST: dict[str, Any] = {"permutations": 99, "resamples": 200}


@pytest.mark.parametrize("purity", [0.2, 0.5, 0.9])
def test_planted_information_is_within_its_interval(purity: float) -> None:
    """Of twenty traces most intervals hold the truth, and what is corrected is not biased."""
    truth, inside, errors = known_information(purity), 0, []
    for seed in range(100, 120):
        found = summarise(planted_trace(purity, seed=seed, layers=1), **FAST, seed=seed)
        overall = found.information.overall
        inside += overall.low <= truth <= overall.high
        errors.append(overall.corrected - truth)
    assert inside >= 16
    assert abs(numpy.mean(errors)) < 0.01


def test_bias_goes_where_few_tokens_would_show_information() -> None:
    found = [
        summarise(planted_trace(0, tokens=5, documents=6, seed=s, layers=1), **FAST).information
        for s in range(30)
    ]
    assert numpy.mean([one.overall.observed for one in found]) > 0.02
    assert abs(numpy.mean([one.overall.corrected for one in found])) < 0.01


def test_habits_of_documents_are_no_specialisation() -> None:
    found = summarise(planted_trace(0, habit=2, documents=10, seed=4), **FAST)
    for measured in (found.nmi, found.cramers_v, found.matching, found.own_share):
        assert measured is not None and measured.overall.p_value > 0.05
    assert found.cells.found == 0
    assert (found.repetition.observed_DL > found.repetition.domain_DL).all()
    numpy.testing.assert_allclose(
        found.repetition.observed_DL, found.repetition.document_DL, atol=0.06
    )
    above = found.distances.halves_LDD[0][~numpy.eye(4, dtype=bool)]
    assert above.mean() < 1.3 * found.distances.floor_LD[0].mean()


def test_a_planted_domain_shows_everywhere() -> None:
    found = summarise(planted_trace(0.6), **FAST)
    assert found.matched_LD.tolist() == [[0, 1, 2, 3]] * 2
    assert found.matching.overall.p_value == pytest.approx(0.01)
    assert found.matching.overall.corrected == pytest.approx(0.7, abs=0.03)
    assert found.cells.found > 20
    assert found.cells.difference_DLE[0, 0].argmax() == 0
    off = found.distances.halves_LDD[:, ~numpy.eye(4, dtype=bool)]
    assert off.min() > found.distances.floor_LD.max()
    assert found.flow is not None and found.coactivation is not None
    assert (found.flow.nmi_L > found.flow.chance_L).all()
    assert abs(found.vocabulary.explained) < 0.05
    assert found.phases.keys() == {"prefill"}
    again = from_dict(RoutingSummary, to_dict(found))
    assert to_dict(again) == to_dict(found)
    assert to_dict(summarise(planted_trace(0.6), **FAST)) == to_dict(found)


def test_syntax_is_not_sold_as_domain() -> None:
    found = summarise(planted_trace(0.9, by_token=0.7, documents=30), **FAST)
    assert found.information.overall.p_value == pytest.approx(0.01)
    assert found.vocabulary.explained > 0.9
    assert found.vocabulary.conditional.p_value > 0.05
    assert (found.vocabulary.specialisation_L > found.vocabulary.shuffled_L).all()


def test_all_routes_may_count() -> None:
    found = summarise(planted_trace(1.0), counted="chosen", **FAST)
    assert found.own_share is not None
    assert found.own_share.overall.observed == pytest.approx(0.5)
    assert found.chosen_share_DLE[0, 0].tolist() == pytest.approx([1, 1, 0, 0])
    with pytest.raises(InputError, match="counted must be"):
        summarise(planted_trace(1.0), counted="all")  # pyright: ignore[reportArgumentType]


def test_measures_equal_scipy_and_sklearn() -> None:
    generator = numpy.random.default_rng(1)
    table = generator.integers(1, 30, (3, 5))
    rows, columns = (
        numpy.repeat(side, table.ravel()) for side in numpy.indices(table.shape).reshape(2, -1)
    )
    assert table_information(table) == pytest.approx(
        normalized_mutual_info_score(rows, columns, average_method="geometric")
    )
    even = generator.multinomial(60, numpy.full(5, 0.2), 3)
    every = [numpy.repeat(side, even.ravel()) for side in numpy.indices(even.shape).reshape(2, -1)]
    assert mutual_information(even)[0] == pytest.approx(mutual_info_score(*every))
    theirs = contingency.association(even, method="cramer")
    assert numpy.sqrt(cramers_v_squared(even)) == pytest.approx(theirs)
    assert matched(numpy.array([[5, 9, 1], [4, 8, 0]])).tolist() in ([0, 1], [1, 0])
    assert matched_share(numpy.eye(3) * 4) == pytest.approx(1)
    assert matched(numpy.array([[3, 0], [9, 0], [0, 5]])).tolist() in ([0, -1, 1], [-1, 0, 1])


def test_permutations_equal_scipys() -> None:
    generator = numpy.random.default_rng(2)
    counts_ME = generator.multinomial(20, [0.5, 0.3, 0.2], 16)
    counts_ME[:8] += generator.multinomial(4, [0.1, 0.1, 0.8], 8)
    domain_M = numpy.repeat([0, 1], 8)

    def statistic(one: Any, other: Any) -> float:
        table = [counts_ME[one.astype(int)].sum(0), counts_ME[other.astype(int)].sum(0)]
        return float(mutual_information(numpy.array(table))[0])

    theirs = permutation_test(
        (numpy.arange(8), numpy.arange(8, 16)),
        statistic,
        vectorized=False,
        n_resamples=999,
        alternative="greater",
        rng=generator,
    )
    documents = Documents(counts_ME[None], domain_M, 2)
    ours = measure(documents, {"i": lambda t: mutual_information(t)[0]}, Draws(999, 1, 0))["i"]
    assert ours.overall.p_value == pytest.approx(theirs.pvalue, abs=0.04)


def test_lift_is_one_over_all_pairs_of_independent_routes() -> None:
    generator = numpy.random.default_rng(0)
    routes_AT = generator.random((20_000, 16)).argsort(1)[:, :4].T
    found = coactivation(routes_AT[None], 16)
    assert found is not None and found.chance == pytest.approx(0.8)
    assert numpy.nanmean(found.lift_LEE) == pytest.approx(0.8, abs=0.01)
    pairs = numpy.array([[0, 0, 2, 2], [1, 1, 3, 3]])
    lift_EE = coactivation(pairs[None], 4).lift_LEE[0]  # pyright: ignore[reportOptionalMemberAccess]
    assert lift_EE[0, 1] == 2 and lift_EE[0, 2] == 0 and numpy.isnan(lift_EE[0, 0])
    assert coactivation(routes_AT[None, :1], 16) is None


def test_flow_between_layers() -> None:
    generator = numpy.random.default_rng(0)
    first_T = generator.integers(0, 4, 4000)
    copied = numpy.stack([first_T, (first_T + 1) % 4, generator.integers(0, 4, 4000)])
    found = flow(copied, numpy.arange(4000) // 50, 4, 0)
    assert found is not None
    assert found.nmi_L[0] == pytest.approx(1) and found.nmi_L[1] < 0.01
    assert found.chance_L[0] < 0.05
    assert found.share_LEE[0].sum() == pytest.approx(1) and found.share_LEE[0, 0, 1] > 0.2
    assert flow(copied[:1], numpy.arange(4000), 4, 0) is None


def shuffled(trace: Trace) -> Trace:
    """The same rows in another order."""
    return trace.rows(numpy.random.default_rng(5).permutation(len(trace)))


def test_a_trace_compared_with_itself_and_with_another() -> None:
    first = planted_trace(0.6)
    same = compare(first, shuffled(first), resamples=50)
    assert (same.overlap_DL == 1).all() and (same.drift_DL < 1e-6).all()
    numpy.testing.assert_allclose(same.agreement_L, 1)
    assert same.loss_change["law"].value == 0
    redrawn = planted_trace(0.6, seed=1)
    second = dataclasses.replace(redrawn, token_id_T=first.token_id_T)
    other = compare(first, second, resamples=50)
    for layer in range(2):
        one_T, other_T = first.experts_TLA[:, layer, 0], second.experts_TLA[:, layer, 0]
        theirs = adjusted_mutual_info_score(one_T, other_T)
        assert other.agreement_L[layer] == pytest.approx(theirs, abs=0.003)
        assert other.top_DL[:, layer].mean() == pytest.approx((one_T == other_T).mean())
    assert (other.overlap_DL > other.chance_DL - 0.05).all() and (other.overlap_DL < 1).all()
    assert other.matched_LE.tolist() == [[0, 1, 2, 3]] * 2
    assert to_dict(from_dict(Comparison, to_dict(other))) == to_dict(other)
    assert len(comparison_tables(other)) == 2
    with pytest.raises(InputError, match="two traces of the same text"):
        compare(first, redrawn)
    with pytest.raises(InputError, match="equally many layers"):
        compare(first, planted_trace(0.6, layers=1))


def test_phases_are_told_apart() -> None:
    trace = planted_trace(0.5)
    half = numpy.arange(len(trace)) % 2 == 1
    mixed = dataclasses.replace(trace, phase_T=half.astype(numpy.int32))
    found = summarise(mixed, **FAST)
    assert found.phases["decode"].tokens == found.phases["prefill"].tokens == len(trace) // 2
    assert found.phases["decode"].lit_L.tolist() == [4, 4]
    assert len(mixed.phase("decode")) == len(trace) // 2
    with pytest.raises(InputError, match="none of 'decode'"):
        trace.phase("decode")
