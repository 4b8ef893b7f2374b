"""Results made up for reports: every kind, with hostile names where names are shown."""

from collections.abc import Callable, Sequence

import numpy

from moiety.analysis.results import (
    Change,
    Comparison,
    Counterfactuals,
    GateSwap,
    Interval,
    Retention,
    Swap,
    TokenRegret,
)

LAYERS = 2


def around(value: float, width: float = 0.02) -> Interval:
    """A value and its interval."""
    return Interval(value=value, low=value - width, high=value + width)


def by(domains: Sequence[str], value: Callable[[int], float]) -> dict[str, Interval]:
    """One interval a domain."""
    return {domain: around(value(at)) for at, domain in enumerate(domains)}


def counterfactuals(domains: Sequence[str]) -> Counterfactuals:
    """As many experts as domains, each the best of its own."""
    names, count = tuple(domains), len(domains)

    def change(expert: int, layer: int | None = None) -> Change:
        return Change(
            expert=expert,
            layer=layer,
            by_domain=by(names, lambda at: 0.4 if at == expert else 0.02),
            overall=around(0.1 + 0.05 * expert),
            p_value=0.01,
            adjusted_p=0.02 if expert else 0.5,
        )

    return Counterfactuals(
        model="tiny",
        experts=names,
        layers=tuple(f"l{layer}" for layer in range(LAYERS)),
        domains=names,
        context_length=64,
        seed=0,
        protocols={"ablated": "The expert's <b>contribution</b> is dropped."},
        learned=by(names, lambda at: 2.0 + at),
        forced_DE=3.0 - numpy.eye(count),
        best_expert={name: name for name in names},
        domain_regret=by(names, lambda at: -0.05),
        document_regret=by(names, lambda at: 0.03 + 0.1 * at),
        ablated=tuple(change(e, layer) for e in range(count) for layer in (None, 0, 1)),
        left_out=tuple(change(e, layer) for e in range(count) for layer in (None, 0, 1)),
        swaps=(
            Swap(
                first=0,
                second=1,
                by_domain=by(names, lambda at: 0.0),
                overall=around(0.001, 0.002),
                redundant=True,
            ),
        ),
        margin=0.01,
        token_regret=(
            TokenRegret(protocol="all layers", tokens=10, by_domain=by(names, lambda at: 0.3)),
        ),
        document_domain=names,
        document_tokens=tuple(range(count)),
        document_learned=numpy.ones(count),
        document_forced_ME=numpy.ones((count, count)),
    )


def retention(domains: Sequence[str]) -> Retention:
    """Sparsity costs 0.01 at home and 0.08 away."""
    names = tuple(domains)
    return Retention(
        experts=names,
        domains=names,
        documents=dict.fromkeys(names, 6),
        context_length=64,
        seed=0,
        base=by(names, lambda at: 3.0),
        dense={name: by(names, lambda at: 2.5) for name in names},
        sparse={name: by(names, lambda at: 2.55) for name in names},
        change={e: {d: around(0.01 if d == e else 0.08) for d in names} for e in names},
        home=around(0.01),
        away=around(0.08),
        retained={name: around(0.9) for name in names},
        composite=by(names, lambda at: 2.6),
        composite_retained={name: around(0.7) for name in names},
    )


def comparison(domains: Sequence[str]) -> Comparison:
    """Two models that share 60 % of their routes, chance 40 %."""
    names, shape = tuple(domains), (len(domains), LAYERS)
    losses = {
        name: by(names, lambda at: 2.0)
        for name in ("first", "second", "first_with_second", "second_with_first")
    }
    return Comparison(
        first="<i>one</i>",
        second="two",
        domains=names,
        layers=tuple(f"l{layer}" for layer in range(LAYERS)),
        first_experts=names,
        second_experts=names,
        tokens=480,
        seed=0,
        overlap=by(names, lambda at: 0.6),
        overlap_DL=numpy.full(shape, 0.6),
        jaccard_DL=numpy.full(shape, 0.5),
        top_DL=numpy.full(shape, 0.55),
        chance_DL=numpy.full(shape, 0.4),
        drift_DL=numpy.full(shape, 0.2),
        weight_DL=numpy.full(shape, 0.3),
        agreement_L=numpy.array([0.2, 0.4]),
        matched_LE=numpy.zeros((LAYERS, len(names)), dtype=int),
        loss_change=by(names, lambda at: 0.02),
        gate_swap=GateSwap(
            models=("<i>one</i>", "two"),
            **losses,
            change_first=by(names, lambda at: 0.3 + at),
            change_second=by(names, lambda at: 0.1),
        ),
    )
