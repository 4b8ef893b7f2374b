"""Held-out numbers against routes that are known."""

import math
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator

from moiety.routers import Gate, find_gates, forced, one_hot, uniform
from moiety.routers.evaluation import Evaluation, evaluate, oracle_losses
from moiety.routers.gates import per_token
from moiety.routers.sampling import SWITCHING, labelled_texts
from moiety.scoring import score

CPU = Accelerator(cpu=True)


def _evaluate(toys: ModuleType, model: torch.nn.Module, domain: str) -> Evaluation:
    texts = labelled_texts({domain: toys.domains(5)[domain]}, toys.OWN, True, 0)
    return evaluate(model, find_gates(model), texts, {domain: 1.0}, CPU, batch_size=2, step=0)


def test_known_routes_give_known_numbers(toys: ModuleType) -> None:
    model = toys.mixtral()
    with forced(find_gates(model), one_hot(toys.OWN["law"])):
        own, other = (_evaluate(toys, model, domain) for domain in ("law", "code"))
    assert (own.own_share, own.dead_experts, own.max_violation) == (1.0, 6, 3.0)
    assert own.load_entropy == 0.0 and own.regret == own.loss - 1.0
    assert other.own_share == 0.0
    with forced(find_gates(model), uniform()):
        even = _evaluate(toys, model, "law")
    assert (even.own_share, even.dead_experts, even.max_violation) == (0.25, 0, 0.0)
    assert even.load_entropy == pytest.approx(1.0)


def test_experts_of_weight_nought_carry_no_load(toys: ModuleType) -> None:
    model = toys.mixtral()

    def first_of_two(gate: Gate, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts_TA = torch.tensor([[2, 0]]).expand(len(logits_TE), 2)
        return torch.tensor([[1.0, 0.0]]).expand(len(logits_TE), 2), experts_TA

    with forced(find_gates(model), first_of_two):
        assert _evaluate(toys, model, "law").dead_experts == 6


def test_the_oracle_sends_every_token_to_its_own_expert(toys: ModuleType) -> None:
    model, data = toys.mixtral(), toys.domains(5)
    gates = find_gates(model)
    texts = labelled_texts(data, toys.OWN, True, 0)
    oracle = oracle_losses(model, gates, texts, CPU, batch_size=2)
    for domain, windows in data.items():
        with forced(gates, one_hot(toys.OWN[domain])):
            assert oracle[domain] == pytest.approx(score(model, windows).loss, rel=1e-6)
    with forced(gates, per_token(texts[SWITCHING].own_WC)):
        found = evaluate(
            model, gates, {SWITCHING: texts[SWITCHING]}, oracle, CPU, batch_size=5, step=0
        )
    assert found.own_share == 1.0
    assert found.regret == pytest.approx(0.0, abs=1e-6)


def test_loss_is_that_of_the_model_without_padding(toys: ModuleType) -> None:
    model, windows = toys.mixtral(), toys.domains(5)["law"]
    losses: list[float] = []
    for ids_C, mask_C in zip(windows.ids_WC, windows.mask_WC, strict=True):
        ids_1C = ids_C[mask_C.bool()][None]
        with torch.no_grad():
            logits_CV = model(input_ids=ids_1C).logits[0, :-1].log_softmax(-1)
        losses += (-logits_CV.gather(1, ids_1C[0, 1:, None])).flatten().tolist()
    evaluation = _evaluate(toys, model, "law")
    assert evaluation.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)
    assert Evaluation.from_json(evaluation.to_json()) == evaluation
    assert f"{evaluation.loss:.4f}" in evaluation.line()
