"""What must hold of an ensemble: forced weights, order, equality.

B batch, S sequence.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from moiety.compose.ensemble import EnsembleForCausalLM
from moiety.compose.ensemble.builder import EnsembleBuilder
from moiety.compose.invariants.statement import Invariant, apart, logits_of, stock_model
from moiety.compose.opening import open_any
from moiety.experts.unpack import dense_view


def of_ensemble(builder: EnsembleBuilder, folder: Path, ids_BS: Tensor) -> list[Invariant]:
    """All weight on one expert is its dense twin; order and, of equal experts, weights say nothing.

    The twins are stock models, so packed experts compute what their dense weights say.
    """
    model = open_any(folder, torch.float32).model
    assert isinstance(model, EnsembleForCausalLM)
    found: list[Invariant] = []
    first: Tensor | None = None
    for name in builder.recipe.names:
        weights = dense_view(builder.experts[name])
        twin = {key: weights[key].float() for key in weights if builder.is_known(key)}
        alone = logits_of(stock_model(builder.architecture, twin), ids_BS).log_softmax(-1)
        with model.forced(name):
            difference = apart(logits_of(model, ids_BS), alone)
        found.append(Invariant(f"all weight on {name} is that expert", difference))
        first = alone if first is None else first
    assert first is not None
    return [*found, _order(model, ids_BS), _equal(model, ids_BS, first)]


def _order(model: EnsembleForCausalLM, ids_BS: Tensor) -> Invariant:
    usual = logits_of(model, ids_BS)
    _reverse(model)
    difference = apart(logits_of(model, ids_BS), usual)
    _reverse(model)
    statement = "experts in another order change nothing but the posterior's names"
    return Invariant(statement, difference)


def _reverse(model: EnsembleForCausalLM) -> None:
    model.experts = nn.ModuleList(reversed(list(model.experts)))
    model.config.moiety = {"experts": list(reversed(model.config.experts))}


def _equal(model: EnsembleForCausalLM, ids_BS: Tensor, first: Tensor) -> Invariant:
    """The model is left with equal experts."""
    model.experts = nn.ModuleList([model.experts[0]] * len(model.experts))
    difference = apart(logits_of(model, ids_BS), first)
    return Invariant("equal experts are that expert, whatever the prior", difference)
