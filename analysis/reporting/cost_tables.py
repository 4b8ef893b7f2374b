"""Tables of counterfactuals, retention and comparisons."""

from collections.abc import Mapping

from moiety.analysis.reporting.words import interval, quoted
from moiety.analysis.results import (
    Change,
    Comparison,
    Counterfactuals,
    GateSwap,
    Interval,
    Retention,
)
from moiety.analysis.tables import ABSENT, Table

SIGNED = "{:+.3f}"
MOST_ROWS = 60


def regret_table(found: Counterfactuals) -> Table:
    """Losses and regrets by domain."""
    rows = tuple(
        (
            quoted(domain),
            interval(found.learned[domain]),
            quoted(found.best_expert.get(domain, ABSENT)),
            interval(found.domain_regret[domain], SIGNED),
            interval(found.document_regret[domain], SIGNED),
        )
        for domain in found.domains
    )
    return Table(
        title="Regret, nats per token",
        columns=(
            "domain",
            "learned route",
            "best single expert",
            "regret over it",
            "regret over the best of each document",
        ),
        rows=rows,
        note=f"95% intervals over documents. Context length {found.context_length} tokens.",
    )


def token_regret_table(found: Counterfactuals) -> Table:
    """Regret over the best expert of every token, by protocol."""
    return Table(
        title="Regret over the best expert of each token, nats per token",
        columns=("protocol", "tokens", *map(quoted, found.domains)),
        rows=tuple(
            (
                one.protocol,
                f"{one.tokens:,}",
                *(interval(one.by_domain[domain], SIGNED) for domain in found.domains),
            )
            for one in found.token_regret
        ),
        note="Chosen after the loss was seen: a bound, not something a router can reach.",
    )


def change_table(title: str, changes: tuple[Change, ...], found: Counterfactuals) -> Table:
    """Changes of loss by expert and domain, largest first."""
    ordered = sorted(changes, key=lambda one: -one.overall.value)[:MOST_ROWS]
    rows = tuple(
        (
            _place(one, found),
            interval(one.overall, SIGNED),
            *(interval(one.by_domain[domain], SIGNED) for domain in found.domains),
            f"{one.adjusted_p:.3f}",
        )
        for one in ordered
    )
    more = f" The largest {MOST_ROWS} of {len(changes)}." if len(changes) > MOST_ROWS else ""
    return Table(
        title=title,
        columns=("expert", "mean", *map(quoted, found.domains), "adjusted p"),
        rows=rows,
        note=f"Nats per token more than the learned route, with 95% intervals.{more}",
    )


def _place(one: Change, found: Counterfactuals) -> str:
    name = quoted(found.experts[one.expert])
    return name if one.layer is None else f"{name}, layer {one.layer}"


def swap_table(found: Counterfactuals) -> Table:
    """Pairs of experts exchanged, cheapest first."""
    ordered = sorted(found.swaps, key=lambda one: one.overall.value)[:MOST_ROWS]
    return Table(
        title="Two experts exchanged",
        columns=("experts", "change of loss", "redundant"),
        rows=tuple(
            (
                f"{quoted(found.experts[one.first])} and {quoted(found.experts[one.second])}",
                interval(one.overall, SIGNED),
                "yes" if one.redundant else "no",
            )
            for one in ordered
        ),
        note=f"Nats per token. Redundant: the interval ends at or below {found.margin:g}.",
    )


def retention_table(found: Retention) -> Table:
    """Loss of every model on every domain."""
    rows = [("base", *_cells(found.base, found.domains))]
    for kind, models in (("dense", found.dense), ("sparse", found.sparse)):
        rows += [
            (f"{quoted(expert)}, {kind}", *_cells(models[expert], found.domains))
            for expert in found.experts
            if expert in models
        ]
    if found.composite is not None:
        rows.append(("composite", *_cells(found.composite, found.domains)))
    return Table(
        title="Every model on every domain, nats per token",
        columns=("model", *map(quoted, found.domains)),
        rows=tuple(rows),
        note=f"95% intervals over documents. Context length {found.context_length} tokens.",
    )


def change_of_sparsity_table(found: Retention) -> Table:
    """Sparse less dense."""
    return Table(
        title="Sparse less dense, nats per token",
        columns=("expert", *map(quoted, found.domains)),
        rows=tuple(
            (quoted(expert), *_cells(found.change[expert], found.domains, SIGNED))
            for expert in found.experts
            if expert in found.change
        ),
        note="Paired by document.",
    )


def overlap_table(found: Comparison) -> Table:
    """How alike the two route each domain."""
    rows = tuple(
        (
            quoted(domain),
            interval(found.overlap[domain], "{:.1%}") if domain in found.overlap else ABSENT,
            f"{found.chance_DL[row].mean():.1%}",
            f"{found.top_DL[row].mean():.1%}",
            f"{found.drift_DL[row].mean():.3f}",
            interval(found.loss_change[domain], SIGNED) if domain in found.loss_change else ABSENT,
        )
        for row, domain in enumerate(found.domains)
    )
    return Table(
        title="The two side by side",
        columns=(
            "domain",
            "experts shared",
            "chance",
            "same first expert",
            "drift",
            "change of loss",
        ),
        rows=rows,
        note="Means over layers. Drift: Jensen-Shannon distance of the loads. Loss: second less first, "
        "nats per token.",
    )


def swap_of_gates_table(found: GateSwap, domains: tuple[str, ...]) -> Table:
    """Losses with the gates exchanged."""
    rows = (
        ("first", found.first),
        ("first, with the second's gates", found.first_with_second),
        ("second", found.second),
        ("second, with the first's gates", found.second_with_first),
    )
    return Table(
        title="Gates exchanged, nats per token",
        columns=("model", *map(quoted, domains)),
        rows=tuple((name, *_cells(values, domains)) for name, values in rows),
    )


def _cells(
    values: Mapping[str, Interval], domains: tuple[str, ...], form: str = "{:.3f}"
) -> list[str]:
    return [interval(values[domain], form) if domain in values else ABSENT for domain in domains]
