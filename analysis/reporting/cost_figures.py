"""Figures of what a wrong route costs, and of what sparsity does at home and away.

E experts, D domains.
"""

import numpy

from moiety.analysis.reporting.document import Figure
from moiety.analysis.reporting.plots import DIVERGING, bars, heatmap
from moiety.analysis.results import Change, Counterfactuals, Interval, Retention

NATS = "nats per token"
MOST_BARS = 24


def regret(found: Counterfactuals) -> Figure:
    """Loss above the best expert, of the domain and of each document."""
    groups: list[tuple[str, list[Interval]]] = [
        ("best expert of the domain", [found.domain_regret[d] for d in found.domains]),
        (
            "best expert of each document, by hindsight",
            [found.document_regret[d] for d in found.domains],
        ),
    ]
    for one in found.token_regret:
        protocol = one.protocol.partition(":")[0]
        groups.append(
            (f"best of each token, {protocol}", [one.by_domain[d] for d in found.domains])
        )
    return Figure(
        name="regret",
        title="Regret of the learned route, by domain",
        spec=bars(groups, found.domains, NATS),
        note="Loss above what one forced expert would have cost; below 0 mixing experts pays. "
        "Lines: 95% intervals over documents. Of each token: see the methods.",
        summary="A pair of bars for each domain; the table has the values.",
    )


def forced(found: Counterfactuals) -> Figure:
    """Every domain through every expert."""
    learned = numpy.array([found.learned[domain].value for domain in found.domains])
    change = found.forced_DE - learned[:, None]
    return Figure(
        name="forced",
        title="Every token through one expert",
        spec=heatmap(
            [("change", change)], found.domains, found.experts, form="+.3f", scale=DIVERGING
        ),
        note="Loss when one expert takes all, less that of the learned route, in nats per token.",
        summary="A grid of domains and experts; negative numbers are better than the learned route.",
    )


def removed(found: Counterfactuals) -> Figure | None:
    """Experts ablated or left out, by expert."""
    groups = [
        (name, changes)
        for name, changes in (
            ("contribution dropped", _whole(found.ablated)),
            ("left out, next best instead", _whole(found.left_out)),
        )
        if changes
    ]
    if not groups:
        return None
    chosen = sorted(groups[0][1], key=lambda one: -one.overall.value)[:MOST_BARS]
    shown = sorted({one.expert for one in chosen})
    values = []
    for name, changes in groups:
        by_expert = {one.expert: one.overall for one in changes}
        absent = Interval(value=numpy.nan, low=numpy.nan, high=numpy.nan)
        values.append((name, [by_expert.get(expert, absent) for expert in shown]))
    more = f" The {MOST_BARS} that matter most." if len(groups[0][1]) > MOST_BARS else ""
    return Figure(
        name="removed",
        title="Without an expert",
        spec=bars(values, [found.experts[expert] for expert in shown], f"more {NATS}"),
        note=f"Change of loss, mean over domains, with 95% intervals over documents.{more}",
        summary="Bars for each expert; the table has the values by domain.",
    )


def removed_by_layer(found: Counterfactuals) -> Figure | None:
    """Experts ablated in single layers."""
    single = [one for one in found.ablated if one.layer is not None]
    if not single:
        return None
    grid = numpy.full((len(found.layers), len(found.experts)), numpy.nan)
    for one in single:
        assert one.layer is not None
        grid[one.layer, one.expert] = one.overall.value
    rows = [f"layer {layer}" for layer in range(len(found.layers))]
    return Figure(
        name="removed-by-layer",
        title="Without an expert, in one layer",
        spec=heatmap([("change", grid)], rows, found.experts, form="+.3f", scale=DIVERGING),
        note=f"Change of loss in {NATS} when the expert's contribution to that layer is dropped.",
        summary="A grid of layers and experts.",
    )


def _whole(changes: tuple[Change, ...]) -> list[Change]:
    return [one for one in changes if one.layer is None]


def retention(found: Retention) -> Figure:
    """What sparsity changes, each expert on each domain."""
    grid = numpy.array(
        [[_value(found.change, expert, d) for d in found.domains] for expert in found.experts]
    )
    return Figure(
        name="retention",
        title="What sparsity costs, expert by domain",
        spec=heatmap(
            [("change", grid)], found.experts, found.domains, form="+.3f", scale=DIVERGING
        ),
        note=f"Sparse less dense, {NATS}. An expert is at home in the domain of its name.",
        summary="A grid of experts and domains; the table has the intervals.",
    )


def _value(change: dict[str, dict[str, Interval]], expert: str, domain: str) -> float:
    found = change.get(expert, {}).get(domain)
    return numpy.nan if found is None else found.value


def retained(found: Retention) -> Figure | None:
    """The share of each finetune's gain that is left."""
    names = [expert for expert in found.experts if expert in found.retained]
    if not names:
        return None
    groups = [("sparse expert", [found.retained[name] for name in names])]
    if found.composite_retained:
        known = found.composite_retained
        absent = Interval(value=numpy.nan, low=numpy.nan, high=numpy.nan)
        groups.append(("composite", [known.get(name, absent) for name in names]))
    figure = bars(groups, names, "share of the gain")
    figure["layout"]["yaxis"]["tickformat"] = ".0%"
    return Figure(
        name="retained",
        title="What is left of each finetune's gain at home",
        spec=figure,
        note="(base - sparse) / (base - dense), with 95% intervals over documents.",
        summary="A bar for each finetune; 100% keeps all it had gained.",
    )
