"""Statistics against hand values and scipy; the permutation test keeps its level."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from scipy.stats import chi2_contingency, entropy

from moiety.analysis.statistics import summarise
from moiety.analysis.statistics.measures import (
    load,
    max_violation,
    mean_by_domain,
    mutual_information,
    top_counts,
    weight_share,
)
from moiety.analysis.statistics.resampling import (
    Documents,
    Draws,
    distinct_labellings,
    measure,
    smallest_p,
)
from moiety.analysis.trace.file import Trace
from moiety.errors import InputError


def test_shares_and_balance_by_hand() -> None:
    experts_TLA = numpy.array([[[0, 1]], [[0, 2]], [[1, 0]]], numpy.int16)
    weights_TLA = numpy.array([[[3.0, 1.0]], [[0.5, 0.5]], [[0.0, 0.0]]], numpy.float32)
    domain_T = numpy.array([0, 0, 1], numpy.int32)
    share_DLE = weight_share(experts_TLA, weights_TLA, domain_T, 2, 3)
    numpy.testing.assert_allclose(share_DLE[:, 0], [[0.625, 0.125, 0.25], [0.5, 0.5, 0]])
    load_LE = load(experts_TLA, 3)
    numpy.testing.assert_allclose(load_LE, [[3 / 6, 2 / 6, 1 / 6]])
    numpy.testing.assert_allclose(max_violation(load_LE), [0.5])


def test_information_equals_scipy() -> None:
    counts_DE = numpy.random.default_rng(0).integers(1, 50, (3, 5))
    given_DE = counts_DE / counts_DE.sum(1, keepdims=True)
    information = entropy(given_DE.mean(0)) - entropy(given_DE, axis=1).mean()
    found, normalised = mutual_information(counts_DE)
    assert found == pytest.approx(information)
    scale = numpy.sqrt(entropy(given_DE.mean(0)) * numpy.log(3))
    assert normalised == pytest.approx(information / scale)


def test_information_at_its_ends() -> None:
    assert mutual_information(numpy.eye(4) * 7)[1] == pytest.approx(1)
    assert mutual_information(numpy.ones((4, 4)))[1] == pytest.approx(0)
    assert mutual_information(numpy.array([[5, 0], [9, 0]]))[1] == 0
    assert mutual_information(numpy.array([[5, 3]]))[1] == 0


def test_means_skip_unknown_values() -> None:
    values_T = numpy.array([1.0, numpy.nan, 3.0, numpy.nan])
    means_D = mean_by_domain(values_T, numpy.array([0, 0, 0, 1]), 2)
    assert means_D[0] == 2
    assert numpy.isnan(means_D[1])


def test_planted_specialisation_is_found_whole(plant: Any) -> None:
    summary = summarise(Trace.open(plant(purity=1.0)))
    assert summary.normalized_mutual_information == pytest.approx(1)
    assert set(summary.own_domain_share.values()) == {1.0}
    assert summary.nmi.overall.p_value == pytest.approx(1 / 1000)
    assert all(null.p_value < 0.05 for null in summary.nmi.layers)
    numpy.testing.assert_allclose(summary.share_DLE[0, :, 0], 0.75)


def test_random_routing_is_not_called_specialised(plant: Any) -> None:
    summary = summarise(Trace.open(plant(purity=0.0, length=60)))
    assert summary.nmi.overall.p_value > 0.05
    assert summary.normalized_mutual_information < 0.05
    assert all(abs(share - 0.25) < 0.1 for share in summary.own_domain_share.values())


def information(table_PLDE: Any) -> Any:
    return mutual_information(table_PLDE)[0]


def clustered(generator: numpy.random.Generator) -> tuple[Any, Any, Any]:
    """Routes that depend on the document and not on its domain."""
    documents, tokens, experts = 24, 40, 4
    domain_M = numpy.repeat([0, 1], documents // 2)
    habits_ME = generator.dirichlet(numpy.ones(experts), documents)
    counts_ME = numpy.stack([generator.multinomial(tokens, habit_E) for habit_E in habits_ME])
    pooled_DE = numpy.stack([counts_ME[domain_M == domain].sum(0) for domain in (0, 1)])
    return counts_ME[None], domain_M, pooled_DE


def test_level_holds_where_a_test_over_tokens_fails() -> None:
    generator = numpy.random.default_rng(0)
    trials = 300
    by_documents = by_tokens = 0
    for trial in range(trials):
        counts_LME, domain_M, pooled_DE = clustered(generator)
        documents = Documents(counts_LME, domain_M, 2)
        found = measure(documents, {"information": information}, Draws(99, 1, trial))
        by_documents += found["information"].overall.p_value <= 0.05
        result: Any = chi2_contingency(pooled_DE)
        by_tokens += result.pvalue <= 0.05
    assert 0.02 <= by_documents / trials <= 0.09
    assert by_tokens / trials > 0.8


def test_few_documents_cannot_be_significant() -> None:
    counts_LME = numpy.array([[[9, 0], [0, 9]]])
    domain_M = numpy.array([0, 1])
    documents = Documents(counts_LME, domain_M, 2)
    found = measure(documents, {"information": information}, Draws(99, 1, 0))["information"]
    assert found.overall.observed == pytest.approx(numpy.log(2))
    assert found.overall.p_value == 1
    assert smallest_p(domain_M, 99) == 1


def test_distinct_labellings_by_hand() -> None:
    assert distinct_labellings(numpy.array([0, 0, 1, 1])) == pytest.approx(3)
    assert distinct_labellings(numpy.array([0, 0, 1])) == pytest.approx(3)
    assert distinct_labellings(numpy.zeros(5, int)) == pytest.approx(1)
    assert distinct_labellings(numpy.arange(5000) % 2) == pytest.approx(1e300)


def test_counts_by_group() -> None:
    experts_TLA = numpy.array([[[1, 0], [0, 1]], [[1, 0], [1, 0]]])
    counts = top_counts(experts_TLA, numpy.array([0, 1]), 2, 2)
    assert counts.tolist() == [[[0, 1], [0, 1]], [[1, 0], [0, 1]]]


def test_own_experts_can_be_named(plant: Any) -> None:
    trace = Trace.open(plant())
    summary = summarise(trace, {"law": "code", "code": 2}, permutations=9)
    assert summary.own_domain_share == {"law": 0.0, "code": 0.0}
    for wrong in ({"sea": 0}, {"law": "sea"}, {"law": 4}):
        with pytest.raises(InputError, match="own_expert"):
            summarise(trace, wrong, permutations=9)
    with pytest.raises(InputError, match="permutations"):
        summarise(trace, permutations=0)


def test_summary_is_json_and_repeats(plant: Any) -> None:
    path: Path = plant(purity=0.3)
    first, again = (summarise(Trace.open(path)).to_dict() for _ in range(2))
    text = json.dumps(first, allow_nan=False)
    assert text == json.dumps(again, allow_nan=False)
    assert first["header"]["experts"] == ["arithmetic", "code", "law", "prose"]
    assert first["nmi"]["overall"]["observed"] > 0
