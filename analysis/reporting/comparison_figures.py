"""Figures of two traces of the same text."""

from collections.abc import Iterator

import numpy

from moiety.analysis.reporting.document import Figure
from moiety.analysis.reporting.plots import bars, curve, heatmap, over_layers
from moiety.analysis.results import Comparison

CHANCE = {"mode": "lines", "line": {"dash": "dot", "width": 1.5}}


def all_of(found: Comparison) -> Iterator[Figure]:
    """Every figure that the comparison has numbers for."""
    if numpy.isfinite(found.overlap_DL).any():
        yield overlap(found)
        yield drift(found)
    yield agreement(found)
    if found.gate_swap is not None:
        yield gate_swap(found)


def overlap(found: Comparison) -> Figure:
    """Shared experts by layer, against chance."""
    data = [
        curve("experts shared", found.overlap_DL.mean(0).tolist(), line={"width": 2.5}),
        curve("same first expert", found.top_DL.mean(0).tolist(), accent="second"),
        curve("shared by chance", found.chance_DL.mean(0).tolist(), **CHANCE),
    ]
    return Figure(
        name="overlap",
        title="Shared routes, by layer",
        spec=over_layers("of tokens", data, len(found.layers), ".0%"),
        note="Means over domains.",
        summary="Lines over layers: shared experts, the same first expert, and chance.",
    )


def drift(found: Comparison) -> Figure:
    """Where the loads moved."""
    layers = [f"layer {layer}" for layer in range(len(found.layers))]
    return Figure(
        name="drift",
        title="Drift, layer by domain",
        spec=heatmap([("drift", found.drift_DL.T)], layers, found.domains, form=".2f"),
        note="Jensen-Shannon distance between the two loads, 0 to 1.",
        summary="A grid of layers and domains.",
    )


def agreement(found: Comparison) -> Figure:
    """Whether tokens are partitioned alike."""
    data = [curve("agreement", found.agreement_L.tolist(), line={"width": 2.5})]
    return Figure(
        name="agreement",
        title="Agreement whatever the experts' numbers",
        spec=over_layers("adjusted mutual information", data, len(found.layers)),
        note="1: the same partition of tokens; 0: chance.",
        summary="A line over layers.",
    )


def gate_swap(found: Comparison) -> Figure:
    """What the other's gates cost."""
    swap = found.gate_swap
    assert swap is not None
    groups = [
        ("first, with the second's gates", [swap.change_first[d] for d in found.domains]),
        ("second, with the first's gates", [swap.change_second[d] for d in found.domains]),
    ]
    return Figure(
        name="gate-swap",
        title="Gates exchanged",
        spec=bars(groups, found.domains, "more nats per token"),
        note="Change of loss with the other's gates, 95% intervals over documents.",
        summary="A pair of bars for each domain.",
    )
