"""Which routers are measured: controls, mergekit-moe's gates, closed forms and trained gates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from benchmarks.routing_measures import Policy
from benchmarks.routing_models import Kind
from moiety.compose.recipe import Route
from moiety.routers import per_token, random, sequence_level, uniform

CONTEXT = (8, 32, 128)
CONTEXTS: tuple[tuple[int | str, ...], ...] = ((8,), (32,), (128,), ("mean",), CONTEXT)
MERGEKIT_MODES = ("hidden", "hidden_avg", "cheap_embed", "random", "uniform_random")
CONSTANT = 0.4
PLAIN: dict[str, Any] = {"context": []}
BEST = Route().init
"""What gates start from where a row does not say."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One router: the recipe's sections that make it, and what else is done to it.

    Without `route` nothing is fitted. `control` forces a route; `mergekit` is the mode of
    mergekit-moe whose gates take the place of ours.
    """

    name: str
    kind: Kind = "routed"
    fit: Literal["none", "closed_form", "trained"] = "closed_form"
    k: int = 1
    router: dict[str, Any] | None = field(default_factory=lambda: dict(PLAIN))
    route: dict[str, Any] | None = field(default_factory=dict)
    control: str | None = None
    mergekit: str | None = None

    @property
    def key(self) -> str:
        """Names the row among all others."""
        return f"{self.kind}: {self.name}, k={self.k}"


def controls(seed: int) -> dict[str, Callable[[], Policy]]:
    """Routes that are forced, by name; each call starts its random numbers anew."""

    def drawn() -> Policy:
        policy = random(seed)
        return lambda _own_WC: policy

    def by_sequence(own_WC: Tensor):
        return sequence_level(own_WC.shape[1])

    return {
        "uniform": lambda: lambda _own_WC: uniform(),
        "random": drawn,
        "sequence_level": lambda: by_sequence,
        "oracle": lambda: per_token,
    }


def all_rows(experts: Sequence[str], seed: int, train_steps: int) -> list[Row]:
    """Every router that is measured for these experts, controls first."""
    return [
        *_controls(experts, seed),
        *_mergekit(),
        *_mixture(seed),
        *_plain(len(experts)),
        *_context(len(experts)),
        *_trained(len(experts), train_steps),
    ]


def _controls(experts: Sequence[str], seed: int) -> list[Row]:
    weights = dict.fromkeys(experts, CONSTANT)
    kinds: dict[str, dict[str, Any]] = {
        f"constant {CONSTANT} (task arithmetic)": {"kind": "constant", "weights": weights},
        "hash of the token": {"kind": "hash"},
    }
    fixed = [
        Row(name=name, fit="none", router=router, route=None) for name, router in kinds.items()
    ]
    return [*_forced("routed", 1, seed), *fixed]


def _forced(kind: Kind, k: int, seed: int) -> list[Row]:
    """Controls on gates that know nothing, but for the posterior, which is of fitted gates."""
    rows: list[Row] = []
    for name in controls(seed):
        fitted = name == "sequence_level"
        rows.append(
            Row(
                name=name,
                kind=kind,
                k=k,
                fit="closed_form" if fitted else "none",
                router=dict(PLAIN) if kind == "routed" else None,
                route={} if fitted else None,
                control=name,
            )
        )
    return rows


def _mergekit() -> list[Row]:
    return [
        Row(
            name=f"mergekit-moe {mode}",
            kind="mixture",
            k=2,
            fit="none",
            router=None,
            route=None,
            mergekit=mode,
        )
        for mode in MERGEKIT_MODES
    ]


def _mixture(seed: int) -> list[Row]:
    fitted = [
        Row(name=init, kind="mixture", k=k, router=None, route={"init": init})
        for init, k in (("ridge", 1), ("ridge", 2), ("centroid", 2), ("logistic", 2))
    ]
    return [*_forced("mixture", 2, seed), *fitted]


def _plain(experts: int) -> list[Row]:
    """Closed forms on the token alone."""
    inits = ("ridge", "centroid", "logistic", "prompts")
    arrow = {**PLAIN, "score": "absolute"}
    return [
        *(Row(name=init, route={"init": init}) for init in inits),
        Row(name="arrow", router=arrow, route={"init": "arrow"}),
        Row(name="arrow, all experts", k=experts, router=arrow, route={"init": "arrow"}),
        Row(name=BEST, k=2),
        Row(name=f"{BEST}, one router", router={**PLAIN, "span": "all"}),
        Row(name="sequence posterior", router={"kind": "sequence"}),
    ]


def _context(experts: int) -> list[Row]:
    """Closed forms on the token and causal means of what came before it."""
    rows = [
        Row(name=_named(init, context), router={"context": context}, route={"init": init})
        for init in ("ridge", "logistic")
        for context in CONTEXTS
    ]
    best = _named(BEST, CONTEXT)
    rows.append(Row(name=f"{best}, all experts", k=experts, router={"context": CONTEXT}))
    variants: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
        best: (2, {}, {}),
        f"{best}, mass 0.9": (2, {"mass": 0.9}, {}),
        f"{best}, one router": (1, {"span": "all"}, {}),
        f"{best}, sigmoid": (2, {"kind": "sigmoid"}, {}),
        f"{best}, pure text only": (1, {}, {"stitch": 0}),
    }
    return rows + [
        Row(name=name, k=k, router={"context": CONTEXT, **router}, route=route)
        for name, (k, router, route) in variants.items()
    ]


def _trained(experts: int, steps: int) -> list[Row]:
    """Gates that start from the default and are trained on each objective."""
    objectives = {"language": 2, "distill": 2, "domain": 1, "regret": 1}
    gates = {"plain": (), _context_name(CONTEXT): CONTEXT}
    rows = [
        Row(
            name=f"trained on {objective}, {name}",
            fit="trained",
            k=k,
            router={"context": context},
            route={"objective": objective, "train_steps": steps},
        )
        for name, context in gates.items()
        for objective, k in objectives.items()
    ]
    biased = Row(
        name=f"trained on language, {_context_name(CONTEXT)}, sigmoid, balanced by bias",
        fit="trained",
        k=2,
        router={"context": CONTEXT, "kind": "sigmoid"},
        route={"train_steps": steps, "balance": "bias"},
    )
    soft = Row(
        name=f"trained on language, {_context_name(CONTEXT)}, all experts",
        fit="trained",
        k=experts,
        router={"context": CONTEXT},
        route={"objective": "language", "train_steps": steps},
    )
    return [*rows, biased, soft]


def _named(init: str, context: Sequence[int | str]) -> str:
    return f"{init}, {_context_name(context)}"


def _context_name(context: Sequence[int | str]) -> str:
    return f"context {'+'.join(map(str, context))}"
