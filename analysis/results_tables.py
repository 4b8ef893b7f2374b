"""Counterfactuals, comparisons and retention as tables, the same everywhere."""

from collections.abc import Mapping

import numpy

from moiety.analysis.results import Comparison, Counterfactuals, GateSwap, Interval, Retention
from moiety.analysis.tables import ABSENT, Table
from moiety.analysis.visible import visible_line


def interval(one: Interval | None, form: str = "{:+.3f}") -> str:
    """A number with its interval, as `+0.120 (+0.080 to +0.160)`."""
    if one is None or not numpy.isfinite(one.value):
        return ABSENT
    value = form.format(one.value)
    if not numpy.isfinite(one.low):
        return value
    return f"{value} ({form.format(one.low)} to {form.format(one.high)})"


def counterfactual_tables(result: Counterfactuals) -> list[Table]:
    """Loss by forced expert, regrets, and what removing and swapping experts does."""
    return [_forced(result), _regrets(result), _removed(result), _swapped(result)]


def _forced(result: Counterfactuals) -> Table:
    rows = [
        (
            visible_line(domain),
            interval(result.learned[domain], "{:.3f}"),
            *(_number(value) for value in result.forced_DE[at]),
        )
        for at, domain in enumerate(result.domains)
    ]
    return Table(
        title="Loss when every token goes to one expert, nats per token",
        columns=("domain", "own routes", *(visible_line(name) for name in result.experts)),
        rows=tuple(rows),
        note=f"Context length {result.context_length} tokens.",
    )


def _regrets(result: Counterfactuals) -> Table:
    rows = [
        (
            visible_line(domain),
            visible_line(result.best_expert[domain]),
            interval(result.domain_regret[domain]),
            interval(result.document_regret[domain]),
            *(interval(one.by_domain[domain]) for one in result.token_regret),
        )
        for domain in result.domains
    ]
    heads = ("best of the domain", "best of each document", "of each token", "one token")
    return Table(
        title="Regret of the model's own routes, nats per token",
        columns=("domain", "best expert", *heads[: 2 + len(result.token_regret)]),
        rows=tuple(rows),
        note="Best by hindsight, so regret is overstated; below 0 mixing experts pays.",
    )


def _removed(result: Counterfactuals) -> Table:
    rows = [
        (
            visible_line(result.experts[dropped.expert]),
            "all" if dropped.layer is None else str(dropped.layer),
            interval(dropped.overall),
            f"{dropped.adjusted_p:.3f}",
            interval(left.overall),
            f"{left.adjusted_p:.3f}",
        )
        for dropped, left in zip(result.ablated, result.left_out, strict=True)
    ]
    return Table(
        title="Experts removed: change of loss, nats per token, mean over domains",
        columns=("expert", "layer", "dropped", "adjusted p", "left out", "adjusted p"),
        rows=tuple(rows),
        note="Dropped: nothing in its place. Left out: the gate's next best in its place.",
    )


def _swapped(result: Counterfactuals) -> Table:
    rows = [
        (
            f"{visible_line(result.experts[one.first])} and "
            f"{visible_line(result.experts[one.second])}",
            interval(one.overall),
            "yes" if one.redundant else "no",
        )
        for one in sorted(result.swaps, key=lambda one: one.overall.value)
    ]
    return Table(
        title="Experts swapped: change of loss, nats per token, mean over domains",
        columns=("experts", "change", "redundant"),
        rows=tuple(rows),
        note=f"Redundant: at most {result.margin:g} at the upper end of the interval.",
    )


def comparison_tables(result: Comparison) -> list[Table]:
    """How alike two traces are, by domain and by layer."""
    by_domain = [
        (
            visible_line(domain),
            interval(result.overlap[domain], "{:.1%}"),
            f"{result.chance_DL[at].mean():.1%}",
            f"{result.top_DL[at].mean():.1%}",
            _number(result.drift_DL[at].mean()),
            interval(result.loss_change[domain]),
        )
        for at, domain in enumerate(result.domains)
    ]
    by_layer = [
        (
            str(layer),
            f"{result.overlap_DL[:, layer].mean():.1%}",
            _number(result.drift_DL[:, layer].mean()),
            _number(result.agreement_L[layer]),
        )
        for layer in range(len(result.layers))
    ]
    return [
        Table(
            title="Two traces of the same text, by domain",
            columns=("domain", "overlap", "by chance", "same first", "drift", "loss change"),
            rows=tuple(by_domain),
            note="Overlap: experts of the first that the second chose too. Loss: second less first.",
        ),
        Table(
            title="By layer, mean over domains",
            columns=("layer", "overlap", "drift", "agreement"),
            rows=tuple(by_layer),
            note="Agreement: adjusted mutual information, whatever the experts' numbers.",
        ),
    ]


def gate_swap_table(result: GateSwap) -> Table:
    """Losses of two models with their own gates and with each other's."""
    rows = [
        (
            visible_line(domain),
            interval(result.first[domain], "{:.3f}"),
            interval(result.change_first[domain]),
            interval(result.second[domain], "{:.3f}"),
            interval(result.change_second[domain]),
        )
        for domain in result.first
    ]
    return Table(
        title="Gates swapped, nats per token",
        columns=("domain", "first", "with the second's gates", "second", "with the first's"),
        rows=tuple(rows),
    )


def retention_tables(result: Retention) -> list[Table]:
    """Every model on every domain, and what sparsity changed at home and away."""
    losses = [("base", result.base)]
    for name in result.experts:
        losses.append((f"{name}, dense", result.dense[name]))
        losses.append((f"{name}, sparse", result.sparse[name]))
    if result.composite is not None:
        losses.append(("composite", result.composite))
    changes = [
        (
            visible_line(name),
            *(interval(result.change[name][domain]) for domain in result.domains),
            interval(result.retained.get(name), "{:.0%}"),
            interval((result.composite_retained or {}).get(name), "{:.0%}"),
        )
        for name in result.experts
    ]
    domains = tuple(visible_line(domain) for domain in result.domains)
    return [
        Table(
            title="Loss, nats per token",
            columns=("model", *domains),
            rows=tuple((visible_line(name), *_cells(row, result)) for name, row in losses),
            note=f"Context length {result.context_length} tokens.",
        ),
        Table(
            title="Sparse less dense, nats per token",
            columns=("expert", *domains, "gain retained", "by the composite"),
            rows=tuple(changes),
            note=f"Home {interval(result.home)}, away {interval(result.away)}.",
        ),
    ]


def _cells(row: Mapping[str, Interval], result: Retention) -> list[str]:
    return [interval(row[domain], "{:.3f}") for domain in result.domains]


def _number(value: float) -> str:
    return f"{value:.3f}" if numpy.isfinite(value) else ABSENT
