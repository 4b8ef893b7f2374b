"""Interventions do what their protocols say, and their losses are those of plain forward passes."""

import dataclasses
from typing import Any

import numpy
import pytest
import torch
from scipy.stats import bootstrap

from moiety.analysis.counterfactuals import Settings
from moiety.analysis.counterfactuals.changes import ablate, force, force_one, leave_out, swap
from moiety.analysis.counterfactuals.run import counterfactuals_of
from moiety.analysis.losses import LossDocuments
from moiety.analysis.results import Counterfactuals, from_dict, to_dict
from moiety.analysis.results_tables import counterfactual_tables
from moiety.compose.composite import Composite
from moiety.errors import InputError
from moiety.routers import Gate, Router, RouterSpec, find_gates, forced, one_hot
from moiety.scoring import score
from moiety.text import Windows, token_windows
from tests.analysis.conftest import SENTENCES

EXPERTS = 4


@pytest.fixture
def data(tokenizer: Any) -> dict[str, Windows]:
    texts = {
        "law": [f"{SENTENCES[0]} {number} " * 2 for number in range(4)],
        "code": [f"{SENTENCES[1]} {number}" * 2 for number in range(3)],
    }
    return {name: token_windows(tokenizer, docs, 16, minimum=4) for name, docs in texts.items()}


@pytest.fixture
def composite(model: Any, tokenizer: Any, tmp_path: Any) -> Composite:
    return Composite(tmp_path, model, tokenizer, ("a", "b", "c", "d"))


def gate(experts: int = EXPERTS) -> Gate:
    router = Router(2, experts, RouterSpec(top_k=1))
    return Gate("gate", 0, router, experts, 2)


LOGITS = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
WEIGHTS = torch.tensor([[0.7, 0.3], [0.6, 0.4]])
CHOSEN = torch.tensor([[0, 1], [3, 2]])


def test_changes_by_hand() -> None:
    weights, experts = force(2)(gate(), LOGITS, WEIGHTS, CHOSEN)
    assert experts.tolist() == [[2], [2]] and weights.tolist() == [[1.0], [1.0]]
    weights, experts = ablate(1)(gate(), LOGITS, WEIGHTS, CHOSEN)
    assert experts.tolist() == CHOSEN.tolist()
    torch.testing.assert_close(weights, torch.tensor([[0.7, 0.0], [0.6, 0.4]]))
    weights, experts = leave_out(1)(gate(), LOGITS, WEIGHTS, CHOSEN)
    assert experts.tolist() == [[0, 2], [3, 2]]
    torch.testing.assert_close(weights, WEIGHTS)
    assert swap(0, 3)(gate(), LOGITS, WEIGHTS, CHOSEN)[1].tolist() == [[3, 1], [0, 2]]
    assert ablate(1, layer=5)(gate(), LOGITS, WEIGHTS, CHOSEN)[0] is WEIGHTS
    weights, experts = force_one(torch.tensor([-1, 1]))(gate(), LOGITS, WEIGHTS, CHOSEN)
    assert experts[0].tolist() == [0, 1] and int(experts[1, 0]) == 1
    torch.testing.assert_close(weights, torch.tensor([[0.7, 0.3], [1.0, 0.0]]))


def test_leaving_one_of_all_out_keeps_the_whole_weight() -> None:
    weights, experts = leave_out(0)(gate(2), LOGITS[:, :2], WEIGHTS, torch.tensor([[0, 1], [1, 0]]))
    assert experts.tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_result_agrees_with_plain_passes(composite: Composite, data: dict[str, Windows]) -> None:
    settings = Settings(tokens=2, resamples=50)
    result = counterfactuals_of(composite, data, settings)
    gates = find_gates(composite.model)
    for domain in data:
        learned = score(composite.model, data[domain]).loss
        assert result.learned[domain].value == pytest.approx(learned, abs=1e-5)
    if "Mixtral" in type(composite.model).__name__:
        with forced(gates, one_hot(2)):
            losses = [score(composite.model, windows).loss for windows in data.values()]
        numpy.testing.assert_allclose(result.forced_DE[:, 2], losses, atol=1e-5)
    best = result.document_forced_ME.min(1)
    regret = result.document_learned - best
    tokens = numpy.array(result.document_tokens)
    for domain in data:
        own = numpy.array(result.document_domain) == domain
        expected = (regret[own] * tokens[own]).sum() / tokens[own].sum()
        assert result.document_regret[domain].value == pytest.approx(expected)
        assert result.domain_regret[domain].value <= expected + 1e-9
        whole, one = result.token_regret
        assert whole.by_domain[domain].value >= expected - 1e-9
        assert one.tokens == 4
    assert len(result.ablated) == len(result.left_out) == EXPERTS
    assert len(result.swaps) == 6
    assert from_dict(Counterfactuals, to_dict(result)).protocols == result.protocols
    assert len(counterfactual_tables(result)) == 4


def test_equal_experts_are_redundant(composite: Composite, data: dict[str, Windows]) -> None:
    with torch.no_grad():
        for name, parameter in composite.model.named_parameters():
            if "experts" in name:
                parameter[:] = parameter[:1]
    settings = Settings(experts=(0, 1), tokens=0, resamples=50, by_layer=True)
    result = counterfactuals_of(composite, data, settings)
    assert result.swaps[0].redundant
    assert abs(result.swaps[0].overall.value) < 1e-5
    assert all(abs(change.overall.value) < 1e-5 for change in result.left_out)
    assert len(result.ablated) == 2 * (1 + 3)
    assert numpy.isnan(result.forced_DE[:, 2:]).all()


def test_wrong_experts_are_refused(composite: Composite, data: dict[str, Windows]) -> None:
    with pytest.raises(InputError, match="indices from 0 to 3"):
        counterfactuals_of(composite, data, Settings(experts=(4,)))
    many = dataclasses.replace(composite, experts=tuple(str(n) for n in range(20)))
    with pytest.raises(InputError, match="at most 16 of 20"):
        counterfactuals_of(many, data, Settings())
    with pytest.raises(InputError, match="at least one domain"):
        counterfactuals_of(composite, {}, Settings())


def test_intervals_and_p_values_equal_scipys() -> None:
    generator = numpy.random.default_rng(0)
    tokens = generator.integers(20, 60, 30)
    nats = tokens * generator.normal(0.5, 0.2, 30)
    documents = LossDocuments(("one",), numpy.zeros(30, int), tokens, resamples=4000)
    found = documents.by_domain(nats)["one"]
    theirs: Any = bootstrap(
        (nats, tokens),
        lambda n, t, axis: n.sum(axis) / t.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=generator,
    ).confidence_interval
    assert found.value == pytest.approx(nats.sum() / tokens.sum())
    assert found.low == pytest.approx(theirs.low, abs=0.01)
    assert found.high == pytest.approx(theirs.high, abs=0.01)
    assert documents.p_value(nats) <= 0.01
    assert documents.p_value(nats - nats.mean()) > 0.3
    alone = LossDocuments(("one",), numpy.zeros(1, int), tokens[:1])
    assert numpy.isnan(alone.by_domain(nats[:1])["one"].low)
    assert alone.p_value(nats[:1]) == 1
