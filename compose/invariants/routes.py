"""What must hold of a composite with routes: each one-hot route, a constant one, order, equality.

E experts, B batch, S sequence, T tokens.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moiety.compose.composite import open_composite
from moiety.compose.invariants.statement import (
    ALLOWED,
    Invariant,
    apart,
    logits_of,
    stock_model,
)
from moiety.compose.recipe import Routed
from moiety.compose.routing import RoutingBuilder
from moiety.progress import SILENT, Progress
from moiety.routers import Gate, find_gates, forced, one_hot, watched

CONSTANT = 0.3


def of_routes(
    builder: RoutingBuilder, folder: Path, ids_BS: Tensor, progress: Progress = SILENT
) -> list[Invariant]:
    """Those of mixtures and routed models.

    Each expert's twin is a stock dense model with that expert's weights in the composite's shared
    part, so equality with it also shows that the packed kernels compute what the dense weights
    say.
    """
    found: list[Invariant] = []
    model = open_composite(folder, torch.float32).model
    gates = find_gates(model)
    names = builder.recipe.names
    first: Tensor | None = None
    merge = _Merge(builder) if _is_on_a_base(builder) else None
    for index, name in progress.track(enumerate(names), "check invariants", len(names)):
        twin = builder.twin(name)
        if merge is not None:
            merge.add(twin)
        alone = logits_of(stock_model(builder.base.config, twin), ids_BS)
        with forced(gates, one_hot(index)):
            routed = logits_of(model, ids_BS)
        found.append(Invariant(f"the one-hot route to {name} is that expert", apart(routed, alone)))
        first = alone if first is None else first
    if merge is not None:
        found.append(_constant_is_merge(builder, model, gates, merge, ids_BS))
    assert first is not None
    return found + _of_the_experts(model, gates, ids_BS, first)


def _is_on_a_base(builder: RoutingBuilder) -> bool:
    """Whether experts are differences to a base that stays dense."""
    return isinstance(builder.recipe.compose, Routed) and builder.recipe.compose.base == "dense"


class _Merge:
    """Task arithmetic summed up twin by twin: `start + CONSTANT * Σ_e (twin_e - start)`."""

    def __init__(self, builder: RoutingBuilder) -> None:
        rest = 1 - CONSTANT * len(builder.recipe.names)
        self.tensors = {n: tensor.float() * rest for n, tensor in builder.twin(None).items()}

    def add(self, twin: Mapping[str, Tensor]) -> None:
        """One expert more."""
        for name, tensor in twin.items():
            self.tensors[name].add_(tensor.float(), alpha=CONSTANT)


def _constant_is_merge(
    builder: RoutingBuilder,
    model: PreTrainedModel,
    gates: list[Gate],
    merge: _Merge,
    ids_BS: Tensor,
) -> Invariant:
    count = len(builder.recipe.names)

    def constant(_gate: Gate, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        experts_TE = torch.arange(count).expand(len(logits_TE), count)
        return torch.full(experts_TE.shape, CONSTANT), experts_TE

    with forced(gates, constant):
        mixed = logits_of(model, ids_BS)
    difference = apart(mixed, logits_of(stock_model(builder.base.config, merge.tensors), ids_BS))
    return Invariant(f"the constant route {CONSTANT:g} is task arithmetic", difference)


def _of_the_experts(
    model: PreTrainedModel, gates: list[Gate], ids_BS: Tensor, first: Tensor
) -> list[Invariant]:
    """Permuted experts change nothing; equal ones leave the router no say.

    The first is asked of routers that have weights to permute with the experts, the second of
    those whose weights sum to 1. The model is left with equal experts.
    """
    found: list[Invariant] = []
    sums: list[Tensor] = []
    with watched(gates, lambda route: sums.append(route.weights_TA.float().sum(-1))):
        usual = logits_of(model, ids_BS)
    learned = {gate.name for gate in gates if getattr(gate.module, "weight", None) is not None}
    if len(learned) == len(gates):
        _change(model, _reversed, learned)
        permuted = apart(logits_of(model, ids_BS), usual)
        _change(model, _reversed, learned)
        found.append(
            Invariant("experts in another order change nothing but the routes' names", permuted)
        )
    if all(bool((sum_T - 1).abs().max() < ALLOWED) for sum_T in sums):
        _change(model, _first_of_all, set())
        equal = apart(logits_of(model, ids_BS), first)
        found.append(Invariant("equal experts are that expert, whatever the router", equal))
    return found


def _reversed(tensor: Tensor) -> Tensor:
    return tensor.flip(0)


def _first_of_all(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor).clone()


def _change(model: PreTrainedModel, change: Callable[[Tensor], Tensor], gates: set[str]) -> None:
    """Change the experts' stacks, and all tensors of `gates`, along dimension 0.

    Module by module, so that no second copy of the model is held; a packed module takes all its
    tensors at once.
    """
    for name, module in model.named_modules():
        if not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            continue
        state = module.state_dict()
        own = {key for key in state if "." not in key}
        chosen = {key for key in own if name in gates or ".experts" in f"{name}.{key}"}
        if chosen:
            part = {key: change(state[key]) if key in chosen else state[key] for key in own}
            module.load_state_dict(part, strict=False)
