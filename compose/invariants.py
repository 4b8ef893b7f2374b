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
from moiety.routers import Gate, find_gates, forced, one_hot, watched

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
    first: Tensor | None = None
    merge = _Merge(builder) if _is_on_a_base(builder) else None
    for index, name in progress.track(enumerate(names), "check invariants", len(names)):
        twin = builder.twin(name)
        if merge is not None:
            merge.add(twin)
        alone = _logits(_stock(builder, twin), ids_BS)
        with forced(gates, one_hot(index)):
            routed = _logits(model, ids_BS)
        found.append(
            Invariant(f"the one-hot route to {name} is that expert", _apart(routed, alone))
        )
        first = alone if first is None else first
    if merge is not None:
        found.append(_constant_is_merge(builder, model, gates, merge, ids_BS))
    assert first is not None
    return found + _of_the_experts(model, gates, ids_BS, first)


def _is_on_a_base(builder: RoutingBuilder) -> bool:
    """Whether experts are differences to a base that stays dense."""
    return isinstance(builder.recipe.compose, Routed) and builder.recipe.compose.base == "dense"


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
        mixed = _logits(model, ids_BS)
    apart = _apart(mixed, _logits(_stock(builder, merge.tensors), ids_BS))
    return Invariant(f"the constant route {CONSTANT:g} is task arithmetic", apart)


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
        usual = _logits(model, ids_BS)
    learned = {gate.name for gate in gates if getattr(gate.module, "weight", None) is not None}
    if len(learned) == len(gates):
        _change(model, _reversed, learned)
        permuted = _apart(_logits(model, ids_BS), usual)
        _change(model, _reversed, learned)
        found.append(
            Invariant("experts in another order change nothing but the routes' names", permuted)
        )
    if all(bool((sum_T - 1).abs().max() < ALLOWED) for sum_T in sums):
        _change(model, _first_of_all, set())
        equal = _apart(_logits(model, ids_BS), first)
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
