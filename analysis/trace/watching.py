"""Where a model's routes are read: at its gates, or for an ensemble at its posterior.

B batch, S tokens of a call, T tokens (B x S), E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from moiety.compose.ensemble import EnsembleForCausalLM
from moiety.errors import InputError
from moiety.routers import Gate, Route, find_gates, watched

Listener = Callable[[Route], None]
POSTERIOR = "posterior"


@dataclass(frozen=True)
class Watching:
    """The gates of a model in layer order, and how to hear of their routes."""

    gates: Sequence[Gate]
    listen: Callable[[Sequence[Gate], Listener], AbstractContextManager[None]]

    def watch(self, listener: Listener) -> AbstractContextManager[None]:
        """Call `listener` with every route inside the block."""
        return self.listen(self.gates, listener)

    def without(self, part: nn.Module) -> "Watching":
        """The same, but for gates inside a part of the model."""
        inside = set(part.modules())
        return replace(self, gates=[gate for gate in self.gates if gate.module not in inside])


def watching(model: nn.Module) -> Watching:
    """How to read the routes of a mixture of experts or an ensemble; InputError for other models.

    An ensemble routes whole models, in one layer named `posterior`: each token goes to every
    expert, with the weight that the tokens up to it give the expert in predicting the next one.
    """
    if isinstance(model, EnsembleForCausalLM):
        experts = len(model.experts)
        return Watching([Gate(POSTERIOR, 0, model, experts, experts)], _posterior)
    return Watching(find_gates(model), watched)


def changeable_gates(model: nn.Module) -> list[Gate]:
    """The gates whose routes can be replaced by others; InputError for an ensemble, or without any."""
    if isinstance(model, EnsembleForCausalLM):
        raise InputError(
            "expected a model with gates, whose routes can be changed, but an ensemble has none: it "
            "mixes whole models by their posterior; moiety eval measures each of them on every "
            "domain, moiety trace records the posterior"
        )
    return find_gates(model)


@contextmanager
def _posterior(gates: Sequence[Gate], listener: Listener) -> Iterator[None]:
    def hear(_model: nn.Module, _inputs: Any, output: Any) -> None:
        posterior_TE = output.posterior.flatten(0, 1)
        weights_TE, experts_TE = posterior_TE.sort(dim=-1, descending=True, stable=True)
        logs_TE = posterior_TE.log()
        listener(Route(0, logs_TE, logs_TE, weights_TE, experts_TE, lambda: logs_TE))

    handles = [gate.module.register_forward_hook(hear) for gate in gates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
