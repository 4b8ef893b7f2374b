"""Arrow for routed models: which inputs each expert's task vector answers most, without text.

E experts, O/I out/in features, D model width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moiety.compose.routed.modules import RoutedLinear
from moiety.errors import InputError
from moiety.experts import kernels
from moiety.routers import Gate, find_gates
from moiety.routers.initialise import arrow


def arrow_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """A weight for every gate of a routed model, by the gates' names.

    Each expert's row is the direction in the gate's input that its task vector stretches most,
    over all matrices that read that input (Ostapenko et al. 2024, arXiv:2405.11157, there for
    LoRA). Columns of a gate's context are zero. Raises InputError unless the model holds task
    vectors and its gates have `score: absolute`.
    """
    gates = find_gates(model)
    _check(model, gates)
    return {
        gate.name: _padded(
            arrow([_scaled(readers, expert) for expert in range(gate.experts)]), gate
        )
        for gate, readers in _readers(model, gates)
    }


def _check(model: PreTrainedModel, gates: list[Gate]) -> None:
    layout = getattr(model.config, "moiety", None) or {}
    if not layout.get("base") or layout.get("embeddings"):
        raise InputError(
            "expected a routed composite with base: dense and shared embeddings, because arrow "
            "looks at the experts' task vectors; use another route.init, or build it that way"
        )
    spec = layout.get("router") or {}
    if spec.get("score") != "absolute":
        raise InputError(
            "expected gates with score: absolute, because a direction has no sign, but they are "
            "linear; give compose.router.score: absolute, or use another route.init"
        )


Reader = tuple[RoutedLinear, Tensor]
"""A matrix and, by feature, what its input is of the gate's."""


def _readers(model: PreTrainedModel, gates: list[Gate]) -> Iterator[tuple[Gate, list[Reader]]]:
    """For every gate, the first matrices behind it and those that read the same input.

    Found by sending one token through: norms between a gate and its matrices scale each feature.
    """
    seen: list[tuple[nn.Module, Tensor]] = []

    def listen(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append((module, args[0].detach()))

    wanted = [m for m in model.modules() if isinstance(m, RoutedLinear)]
    handles = [
        module.register_forward_pre_hook(listen)
        for module in [*wanted, *(gate.module for gate in gates)]
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[1]], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    places = {module: place for place, (module, _input) in enumerate(seen)}
    for gate in gates:
        place = places[gate.module]
        asked = seen[place][1].flatten().float()
        first = seen[place + 1][1]
        readers = [
            (module, input.flatten().float() / asked)
            for module, input in seen[place + 1 :]
            if input is first or (input.shape == first.shape and torch.equal(input, first))
            if isinstance(module, RoutedLinear)
        ]
        yield gate, readers


def _scaled(readers: list[Reader], expert: int) -> Tensor:
    """The task vectors of one expert that read a gate's input, as maps of that input (O, D)."""
    each = [
        _delta(module, expert, scale_D.device) * scale_D.nan_to_num() for module, scale_D in readers
    ]
    return torch.cat(each)


def _delta(module: RoutedLinear, expert: int, device: torch.device) -> Tensor:
    """One expert's matrix, dense: (O, I) in fp32."""
    eye_II = torch.eye(module.in_features, device=device)
    ones_I1 = torch.ones((module.in_features, 1), device=device)
    experts_I1 = torch.full(ones_I1.shape, expert, device=device)
    weights = module.weights("experts")
    return kernels.sparse_routed_linear(eye_II, weights, experts_I1, ones_I1, None).T


def _padded(weight_ED: Tensor, gate: Gate) -> Tensor:
    features: Callable[..., int] = gate.module.get_parameter("weight").size
    return torch.nn.functional.pad(weight_ED, (0, features(1) - weight_ED.shape[1]))
