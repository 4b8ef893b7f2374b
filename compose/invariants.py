"""What must hold of a composite whatever its weights, checked again on the user's own models.

E experts, B batch, S sequence, V vocabulary.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moiety.compose.builder import Builder
from moiety.compose.composite import open_composite
from moiety.compose.ensemble import EnsembleForCausalLM
from moiety.compose.ensemble.builder import EnsembleBuilder
from moiety.compose.opening import open_any
from moiety.compose.recipe import Routed
from moiety.compose.routing import RoutingBuilder
from moiety.errors import InvariantError
from moiety.progress import SILENT, Progress
from moiety.routers import Gate, find_gates, forced, one_hot

ALLOWED = 1e-3
"""Largest difference of logits, over their own largest size, that rounding in fp32 explains."""
TOKENS = 32
NEW_TOKENS = 8
CONSTANT = 0.3


@dataclass(frozen=True)
class Invariant:
    """One statement about a composite: `difference` is relative to the largest logit."""

    statement: str
    difference: float
    allowed: float = ALLOWED

    @property
    def holds(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.difference <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        return {**asdict(self), "holds": self.holds}


def check_invariants(
    builder: Builder, folder: Path, progress: Progress = SILENT
) -> list[Invariant]:
    """Every invariant of the composite in `folder`, computed in fp32.

    With routes, each expert's twin is a stock dense model with that expert's weights in the
    composite's shared part, so equality with it also shows that the packed kernels compute what
    the dense weights say. Merges verify their pattern as they are written and have no experts.
    Raises InvariantError that names what does not hold.
    """
    ids_BS = _text(builder)
    found: list[Invariant] = []
    if isinstance(builder, RoutingBuilder):
        found = _of_routes(builder, folder, ids_BS, progress)
    elif isinstance(builder, EnsembleBuilder):
        found = _of_ensemble(builder, folder, ids_BS)
    if found:
        found.append(_saved(folder, ids_BS))
    broken = [invariant for invariant in found if not invariant.holds]
    if broken:
        raise InvariantError(
            "; ".join(
                f"expected that {one.statement}, within {one.allowed:g} of the largest logit, but "
                f"they differ by {one.difference:.2g}"
                for one in broken
            )
        )
    return found


def _of_routes(
    builder: RoutingBuilder, folder: Path, ids_BS: Tensor, progress: Progress
) -> list[Invariant]:
    found: list[Invariant] = []
    model = open_composite(folder, torch.float32).model
    gates = find_gates(model)
    names = builder.recipe.names
    twins: dict[str, Tensor] = {}
    for index, name in progress.track(enumerate(names), "check invariants", len(names)):
        twins[name] = _logits(_stock(builder, builder.twin(name)), ids_BS)
        with forced(gates, one_hot(index)):
            routed = _logits(model, ids_BS)
        found.append(
            Invariant(f"the one-hot route to {name} is that expert", _apart(routed, twins[name]))
        )
    if isinstance(builder.recipe.compose, Routed) and builder.recipe.compose.base == "dense":
        found.append(_constant_is_merge(builder, model, gates, ids_BS))
    return found + _of_the_experts(model, ids_BS, twins[names[0]])


def _of_ensemble(builder: EnsembleBuilder, folder: Path, ids_BS: Tensor) -> list[Invariant]:
    model = open_any(folder).model
    assert isinstance(model, EnsembleForCausalLM)
    found: list[Invariant] = []
    for name in builder.recipe.names:
        alone = _logits(builder.open_expert(name), ids_BS).log_softmax(-1)
        with model.forced(name):
            found.append(
                Invariant(
                    f"all weight on {name} is that expert", _apart(_logits(model, ids_BS), alone)
                )
            )
    return found


def _text(builder: Builder) -> Tensor:
    """The first tokens of each domain's calibration text (B, S)."""
    rows = [windows.ids_WC[0] for windows in builder.calibration.values()]
    lengths = [int(windows.mask_WC[0].sum()) for windows in builder.calibration.values()]
    return torch.stack([row[: min(TOKENS, *lengths)] for row in rows])


@torch.no_grad()
def _logits(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    return model(input_ids=ids_BS).logits.float()


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _stock(builder: RoutingBuilder, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A dense model of the base's architecture with other weights, in fp32."""
    model = AutoModelForCausalLM.from_config(builder.base.config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    absent = set(missing) - set(getattr(model, "all_tied_weights_keys", None) or {})
    if absent or unexpected:
        raise InvariantError(
            f"expected each expert to have every tensor, but {[*absent, *unexpected][0]} is "
            "missing or has no place"
        )
    return model


def _constant_is_merge(
    builder: RoutingBuilder, model: PreTrainedModel, gates: list[Gate], ids_BS: Tensor
) -> Invariant:
    names = builder.recipe.names
    start = {name: tensor.float() for name, tensor in builder.twin(None).items()}
    merged = dict(start)
    for name in names:
        for key, tensor in builder.twin(name).items():
            merged[key] = merged[key] + CONSTANT * (tensor.float() - start[key])

    def constant(_gate: Gate, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        experts_TE = torch.arange(len(names)).expand(len(logits_TE), len(names))
        return torch.full(experts_TE.shape, CONSTANT), experts_TE

    with forced(gates, constant):
        mixed = _logits(model, ids_BS)
    apart = _apart(mixed, _logits(_stock(builder, merged), ids_BS))
    return Invariant(f"the constant route {CONSTANT:g} is task arithmetic", apart)


def _of_the_experts(model: PreTrainedModel, ids_BS: Tensor, first: Tensor) -> list[Invariant]:
    """Permuted experts change nothing; equal ones leave the router no say."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gates = find_gates(model)
    usual = _logits(model, ids_BS)
    order = list(range(gates[0].experts))[::-1]
    weights = {f"{gate.name}.weight" for gate in gates}
    _change(model, state, lambda tensor: tensor[order], weights)
    permuted = _apart(_logits(model, ids_BS), usual)
    _change(model, state, lambda tensor: tensor[:1].expand_as(tensor), set())
    equal = _apart(_logits(model, ids_BS), first)
    return [
        Invariant("experts in another order change nothing but the routes' names", permuted),
        Invariant("equal experts are that expert, whatever the router", equal),
    ]


def _change(
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    change: Callable[[Tensor], Tensor],
    others: set[str],
) -> None:
    """Load the weights with the experts' stacks, and `others`, changed along dimension 0."""
    changed = {
        name: change(tensor).clone() if ".experts" in name or name in others else tensor
        for name, tensor in state.items()
    }
    model.load_state_dict(changed)


def _saved(folder: Path, ids_BS: Tensor) -> Invariant:
    """Saved and opened again, the composite generates the same tokens and gives equal logits."""
    model = open_any(folder).model
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saved.") as scratch:
        model.save_pretrained(scratch)
        again = AutoModelForCausalLM.from_pretrained(scratch, dtype="auto").eval()
    apart = _apart(_logits(again, ids_BS), _logits(model, ids_BS))
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    mask_BS = torch.ones_like(ids_BS)
    both: list[Any] = [model, again]
    written = [one.generate(ids_BS, attention_mask=mask_BS, **settings) for one in both]
    same = torch.equal(written[0], written[1])
    statement = "saved and opened again it gives the same logits and generates the same tokens"
    return Invariant(statement, apart if same else float("inf"), 0.0)
