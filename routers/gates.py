"""The gates of any stock mixture of experts: find them, watch them, override them.

T tokens (batch and sequence flattened, padding included), D model width, E experts,
A active experts (routes of one token), W features that a gate's logits are linear in.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.routers.outputs import read_route, with_route
from moiety.routers.router import Router


@dataclass(frozen=True)
class Gate:
    """One router of a model: its module, where it stands and how many experts it chooses from.

    `layer` counts the routed layers from 0; a model with dense layers between has fewer gates
    than decoder layers. `module(hidden_TD)` gives `(logits_TE, weights_TA, experts_TA)`.
    """

    name: str
    layer: int
    module: nn.Module
    experts: int
    active: int


@dataclass(frozen=True)
class Route:
    """What one gate did with one batch of tokens."""

    layer: int
    hidden_TD: Tensor
    logits_TE: Tensor
    weights_TA: Tensor
    experts_TA: Tensor
    see: Callable[[], Tensor]

    @property
    def features_TW(self) -> Tensor:
        """What the gate's logits are linear in, in fp32; to be asked for by the listener only."""
        return self.see()


RoutePolicy = Callable[[Gate, Tensor], tuple[Tensor, Tensor]]
"""`(gate, logits_TE) -> (weights_TA, experts_TA)`, A free to differ from the gate's own."""

RouteChange = Callable[[Gate, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(gate, logits_TE, weights_TA, experts_TA) -> (weights_TA, experts_TA)`."""


def find_gates(model: nn.Module) -> list[Gate]:
    """The gates of a model in layer order.

    A gate is our own `Router`, a module that transformers itself records router logits of
    (`_can_record_outputs`), or the child `gate` (or `router`) of a module that also has a child
    `experts`. Raises InputError when there is none.
    """
    recorded = _recorded(model)
    gates: list[Gate] = []
    for name, module in model.named_modules():
        owner = model.get_submodule(name.rpartition(".")[0]) if name else model
        if module in recorded or _is_gate(module, name.rpartition(".")[2], owner):
            gates.append(_gate(name, len(gates), module, owner))
    if not gates:
        raise InputError(
            f"expected a mixture of experts, but {type(model).__name__} has no gates; "
            "pass a composite or another MoE model"
        )
    return gates


def _is_gate(module: nn.Module, child: str, owner: nn.Module) -> bool:
    stock = isinstance(getattr(owner, "experts", None), nn.Module)
    return isinstance(module, Router) or (child in ("gate", "router") and stock)


def _recorded(model: nn.Module) -> set[nn.Module]:
    """Modules whose router logits transformers records, the innermost of nested ones only."""
    classes: set[type[nn.Module]] = set()
    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, list | tuple) else [recorders]:
            classes.add(getattr(recorder, "target_class", recorder))
    found = {module for module in model.modules() if type(module) in classes}
    return {
        module
        for module in found
        if not any(inner is not module and inner in found for inner in module.modules())
    }


def _gate(name: str, layer: int, module: nn.Module, block: nn.Module) -> Gate:
    if isinstance(module, Router):
        return Gate(name, layer, module, module.experts, module.top_k)
    weights = [getattr(part, "weight", None) for part in (module, *module.children())]
    weight = next((w for w in weights if isinstance(w, Tensor) and w.ndim == 2), None)
    if weight is None:
        raise InputError(
            f"expected {name} to be a gate with a weight of shape (experts, width), "
            f"but {type(module).__name__} has none"
        )
    return Gate(name, layer, module, _experts(module, weight.shape[0]), _active(module, block))


def _experts(module: nn.Module, rows: int) -> int:
    """Experts that a gate of so many rows chooses from; Inkling's rows score shared experts too."""
    shared, routed = (getattr(module, name, None) for name in ("n_shared_experts", "num_experts"))
    if isinstance(shared, int) and isinstance(routed, int) and routed + shared == rows:
        return routed
    return rows


def _active(module: nn.Module, block: nn.Module) -> int:
    """Routes of one token, as the gate, its block or the gate's configuration tells."""
    config = getattr(module, "config", None)
    told = [(module, "top_k"), (block, "top_k")]
    told += [(config, name) for name in ("num_experts_per_tok", "top_k_experts")]
    return next((int(value) for owner, name in told if (value := getattr(owner, name, None))), 1)


@contextlib.contextmanager
def watched(gates: Sequence[Gate], listener: Callable[[Route], None]) -> Iterator[None]:
    """Call `listener` with every route that the gates choose inside the block."""

    def hook(gate: Gate) -> Callable[..., None]:
        def listen(_module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any) -> None:
            logits_TE, weights_TA, experts_TA = read_route(outputs, gate.experts, gate.active)
            hidden_TD = inputs[0].reshape(-1, inputs[0].shape[-1])

            def see() -> Tensor:
                if isinstance(gate.module, Router):
                    return gate.module.features(inputs[0])
                return hidden_TD.float()

            listener(Route(gate.layer, hidden_TD, logits_TE, weights_TA, experts_TA, see))

        return listen

    with _hooked(gates, hook):
        yield


@contextlib.contextmanager
def rerouted(gates: Sequence[Gate], change: RouteChange) -> Iterator[None]:
    """Let `change` turn the gates' own routes into others inside the block.

    Watchers entered inside this block see the changed routes.
    """

    def hook(gate: Gate) -> Callable[..., Any]:
        def reroute(_module: nn.Module, _inputs: tuple[Tensor, ...], outputs: Any) -> Any:
            logits_TE, weights_TA, experts_TA = read_route(outputs, gate.experts, gate.active)
            changed_TA, new_experts_TA = change(gate, logits_TE, weights_TA, experts_TA)
            return with_route(outputs, changed_TA.to(weights_TA.dtype), new_experts_TA)

        return reroute

    with _hooked(gates, hook):
        yield


@contextlib.contextmanager
def forced(gates: Sequence[Gate], policy: RoutePolicy) -> Iterator[None]:
    """Let `policy` choose the routes inside the block, whatever the gates say.

    Watchers entered inside this block see the forced routes.
    """

    def change(
        gate: Gate, logits_TE: Tensor, _weights_TA: Tensor, _experts_TA: Tensor
    ) -> tuple[Tensor, Tensor]:
        return policy(gate, logits_TE)

    with rerouted(gates, change):
        yield


@contextlib.contextmanager
def _hooked(gates: Sequence[Gate], hook: Callable[[Gate], Callable[..., Any]]) -> Iterator[None]:
    handles = [gate.module.register_forward_hook(hook(gate)) for gate in gates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def one_hot(expert: int) -> RoutePolicy:
    """Send every token to one expert: the oracle route when the tokens are of its domain."""

    def policy(gate: Gate, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        if not 0 <= expert < gate.experts:
            raise InputError(f"expert must be in 0..{gate.experts - 1}, but it is {expert}")
        shape = (logits_TE.shape[0], 1)
        return (
            torch.ones(shape, device=logits_TE.device),
            torch.full(shape, expert, dtype=torch.int64, device=logits_TE.device),
        )

    return policy


def per_token(own_WC: Tensor) -> RoutePolicy:
    """Send each token to its own expert: `own_WC` in the order of the tokens, below 0 means 0."""
    own_T1 = own_WC.reshape(-1, 1).clamp(min=0)

    def policy(gate: Gate, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        experts_TA = own_T1.to(logits_TE.device)
        if len(experts_TA) != len(logits_TE) or int(experts_TA.max()) >= gate.experts:
            raise InputError(
                f"expected one of {gate.experts} experts for each of {len(logits_TE)} tokens, but "
                f"got {len(experts_TA)} up to number {int(experts_TA.max())}"
            )
        return torch.ones(experts_TA.shape, device=logits_TE.device), experts_TA

    return policy


def uniform() -> RoutePolicy:
    """Send every token to all experts with equal weight."""

    def policy(gate: Gate, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        tokens, experts = logits_TE.shape[0], gate.experts
        experts_TA = torch.arange(experts, device=logits_TE.device).expand(tokens, experts)
        return torch.full((tokens, experts), 1 / experts, device=logits_TE.device), experts_TA

    return policy


def random(seed: int) -> RoutePolicy:
    """Send every token to as many experts as the gate would, drawn at random, equal weights."""
    generator = torch.Generator().manual_seed(seed)

    def policy(gate: Gate, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        noise_TE = torch.rand((logits_TE.shape[0], gate.experts), generator=generator)
        experts_TA = noise_TE.topk(gate.active, dim=-1).indices.to(logits_TE.device)
        return torch.full(experts_TA.shape, 1 / gate.active, device=logits_TE.device), experts_TA

    return policy


def sequence_level(length: int) -> RoutePolicy:
    """Route by one posterior over experts a sequence, updated causally from the gate's own view.

    The posterior after token t is proportional to `exp(Σ_{s<=t} log p_s)`, p the gate's softmax;
    tokens come as rows of `length`. Each token goes to as many experts as the gate would choose.
    """

    def policy(gate: Gate, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        evidence_SCE = logits_TE.float().log_softmax(-1).view(-1, length, gate.experts).cumsum(1)
        posterior_TE = evidence_SCE.softmax(-1).view(-1, gate.experts)
        weights_TA, experts_TA = posterior_TE.topk(gate.active, dim=-1)
        return weights_TA / weights_TA.sum(-1, keepdim=True), experts_TA

    return policy
