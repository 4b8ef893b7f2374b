"""Held-out numbers against routes that are known."""

import math
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator

from moiety.routers import find_gates, forced, one_hot, uniform
from moiety.routers.evaluation import Evaluation, evaluate


def _evaluate(toys: ModuleType, model: torch.nn.Module, domain: str) -> Evaluation:
    data = {domain: toys.domains(5)[domain]}
    gates = find_gates(model)
    return evaluate(model, gates, data, toys.OWN, Accelerator(cpu=True), batch_size=2, step=0)


def test_known_routes_give_known_numbers(toys: ModuleType) -> None:
    model = toys.mixtral()
    with forced(find_gates(model), one_hot(toys.OWN["law"])):
        own, other = (_evaluate(toys, model, domain) for domain in ("law", "code"))
    assert (own.own_share, own.dead_experts, own.max_violation) == (1.0, 6, 3.0)
    assert other.own_share == 0.0
    with forced(find_gates(model), uniform()):
        even = _evaluate(toys, model, "law")
    assert (even.own_share, even.dead_experts, even.max_violation) == (0.25, 0, 0.0)


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
