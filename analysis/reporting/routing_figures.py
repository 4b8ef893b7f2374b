"""Figures of one trace.

L routed layers, E experts, D domains, B bins of position.
"""

from typing import Any

import numpy
from numpy.typing import NDArray

from moiety.analysis.charts import OTHER, expert_colours, label, own_share_figure, share_figure
from moiety.analysis.reporting.document import Figure
from moiety.analysis.reporting.plots import DIVERGING, band, curve, heatmap, over_layers
from moiety.analysis.results import RoutingSummary

FLOW_EXPERTS, FLOW_LAYERS, LEAST_FLOW = 8, 8, 0.004
CHANCE = {"mode": "lines", "line": {"dash": "dot", "width": 1.5}}


def share(summary: RoutingSummary) -> Figure:
    """Domain by expert, for each layer."""
    return Figure(
        name="share",
        title="Routing weight, domain by expert",
        spec=share_figure(summary),
        note="Mean share of a domain's routing weight that each expert gets. A row adds up to 100%.",
        summary="A grid of domains and experts; the table above has each domain's largest share.",
        wide=True,
    )


def information(summary: RoutingSummary) -> Figure:
    """The layer profile of information: corrected, its interval, its null."""
    layers = summary.nmi.layers
    data = [
        *band("95% interval", [one.low for one in layers], [one.high for one in layers]),
        curve("corrected for bias", [one.corrected for one in layers], line={"width": 2.5}),
        curve("as counted", [one.observed for one in layers], line={"dash": "dash", "width": 1.5}),
        curve("95% of permutations below", [one.quantile_95 for one in layers], **CHANCE),
    ]
    return Figure(
        name="information",
        title="Information about the domain, by layer",
        spec=over_layers("NMI", data, len(layers)),
        note="Normalised mutual information of expert and domain. Over the dotted line: more than chance.",
        summary="A line over layers; the table of layers has its values.",
    )


def own_share(summary: RoutingSummary) -> Figure:
    """First to the domain's own expert, by layer."""
    return Figure(
        name="own",
        title="First to the domain's own expert, by layer",
        spec=own_share_figure(summary),
        note="Dotted: chance.",
        summary="A line a domain over layers; the tables have their means.",
    )


def token_identity(summary: RoutingSummary) -> Figure:
    """What of the information is left once the token is known."""
    whole, left = summary.information.layers, summary.vocabulary.conditional_L
    data = [
        curve("about the domain", [one.corrected for one in whole], line={"width": 2.5}),
        *band("95% interval", [one.low for one in left], [one.high for one in left]),
        curve("the token being known", [one.corrected for one in left], accent="second"),
        curve("chance", [one.quantile_95 - one.mean for one in left], **CHANCE),
    ]
    return Figure(
        name="token-identity",
        title="Domain, or only its words?",
        spec=over_layers("nats", data, len(whole)),
        note="I(expert; domain), and I(expert; domain | token): what no vocabulary explains. Both "
        "corrected for bias; chance: how far 95% of permutations stay above their mean.",
        summary="Two lines over layers, the lower one with the token known.",
    )


def distances(summary: RoutingSummary) -> Figure:
    """How far apart domains are routed, like for like."""
    found, names = summary.distances.halves_LDD, summary.header.domains
    return Figure(
        name="distances",
        title="Distance between domains",
        spec=heatmap(_by_layer(found), names, names, form=".2f", limits=(0.0, 1.0)),
        note="Jensen-Shannon distance of half of one domain's documents from half of another's, 0 to 1; "
        "on the diagonal two halves of one domain, which is the noise.",
        summary="A grid of domains; larger numbers are routed more differently.",
    )


def coactivation(summary: RoutingSummary) -> Figure | None:
    """Which experts are chosen together."""
    if summary.coactivation is None:
        return None
    names, found = summary.header.experts, summary.coactivation
    spec = heatmap(
        _by_layer(found.lift_LEE),
        names,
        names,
        form=".2f",
        limits=(0.0, 2 * found.chance),
        scale=DIVERGING,
    )
    return Figure(
        name="coactivation",
        title="Experts chosen together",
        spec=spec,
        note=f"Lift over independence, all pairs; even routes without replacement give {found.chance:.2f}.",
        summary="A grid of experts; above chance two are chosen together more than their loads explain.",
    )


def flow(summary: RoutingSummary) -> Figure | None:
    """From one routed layer to the next."""
    if summary.flow is None:
        return None
    few = len(summary.header.experts) <= FLOW_EXPERTS
    spec = _sankey(summary) if few else _flow_grid(summary)
    return Figure(
        name="flow",
        title="Flow between layers",
        spec=spec,
        note="Tokens by their first expert, from each routed layer to the next."
        + (" Flows under 0.4% of tokens are left out." if few else " Each row adds up to 100%."),
        summary="Streams between the experts of neighbouring layers.",
        choice="Layers",
        wide=True,
    )


def flow_profile(summary: RoutingSummary) -> Figure | None:
    """How much a layer's expert says about the next one's."""
    if summary.flow is None:
        return None
    data = [
        curve("observed", summary.flow.nmi_L.tolist(), line={"width": 2.5}),
        curve("tokens of a document paired at random", summary.flow.chance_L.tolist(), **CHANCE),
    ]
    return Figure(
        name="flow-profile",
        title="Does a layer follow the one before?",
        spec=over_layers("NMI", data, len(summary.flow.nmi_L)),
        note="Between the first experts of layer and next layer.",
        summary="Two lines over layers: observed, and by chance.",
    )


def positions(summary: RoutingSummary) -> Figure:
    """The gates' certainty along the window."""
    found = summary.positions
    far = found.first_B[-1] > 64
    places = [float(place) or (0.5 if far else 0.0) for place in found.first_B]
    data = [
        {**curve("entropy of the gates", found.entropy_BL.mean(1).tolist()), "x": places},
        {**curve("loss", found.loss_B.tolist(), accent="second"), "x": places},
    ]
    spec = over_layers("nats", data, len(found.first_B))
    spec["layout"]["xaxis"] = {
        "title": {"text": "position in the window"},
        "fixedrange": True,
        "type": "log" if far else "linear",
    }
    if far:
        ticks = {"tickvals": places, "ticktext": [str(place) for place in found.first_B]}
        spec["layout"]["xaxis"] |= ticks
    return Figure(
        name="positions",
        title="Along the window",
        spec=spec,
        note="Mean over layers and domains.",
        summary="Two lines over positions: entropy and loss.",
    )


def _by_layer(pictures_L: NDArray[Any]) -> list[tuple[str, NDArray[Any]]]:
    with numpy.errstate(all="ignore"):
        known = numpy.isfinite(pictures_L)
        sums = numpy.where(known, pictures_L, 0).sum(0)
        mean = sums / numpy.where(known.sum(0) > 0, known.sum(0), numpy.nan)
    named = [(f"layer {layer}", picture) for layer, picture in enumerate(pictures_L)]
    return [("mean over layers", mean), *named] if len(named) > 1 else named


def _flow_grid(summary: RoutingSummary) -> dict[str, Any]:
    assert summary.flow is not None
    share_LEE = summary.flow.share_LEE
    rows = share_LEE / numpy.maximum(share_LEE.sum(-1, keepdims=True), 1e-12)
    names = summary.header.experts
    pictures = [(f"{layer} to {layer + 1}", row) for layer, row in enumerate(rows)]
    return heatmap(pictures, names, names, form=".0%", x="next layer's expert")


def _sankey(summary: RoutingSummary) -> dict[str, Any]:
    assert summary.flow is not None
    steps = len(summary.flow.share_LEE)
    starts = range(0, steps, FLOW_LAYERS - 1)
    choices = [
        {
            "name": f"{start} to {min(start + FLOW_LAYERS - 1, steps)}",
            "data": [_streams(summary, start, min(start + FLOW_LAYERS - 1, steps))],
        }
        for start in starts
    ]
    made: dict[str, Any] = {
        "data": choices[0]["data"],
        "layout": {"height": 380, "margin": {"l": 8, "r": 28, "t": 28, "b": 16}},
    }
    if len(choices) > 1:
        made["choices"] = choices
    return made


def _streams(summary: RoutingSummary, start: int, stop: int) -> dict[str, Any]:
    assert summary.flow is not None
    experts, names = len(summary.header.experts), summary.header.experts
    colours = expert_colours(summary)
    source, target, value, shade = [], [], [], []
    for step, share_EE in enumerate(summary.flow.share_LEE[start:stop]):
        for before, after in numpy.argwhere(share_EE >= LEAST_FLOW).tolist():
            source.append(step * experts + before)
            target.append((step + 1) * experts + after)
            value.append(round(float(share_EE[before, after]), 4))
            shade.append(_faint(colours[before]))
    places = range(start, stop + 1)
    middle_PE = _middles(summary.flow.share_LEE[start:stop])
    return {
        "type": "sankey",
        "arrangement": "snap",
        "valueformat": ".1%",
        "node": {
            "label": [
                label(name) if layer in (start, stop) else "" for layer in places for name in names
            ],
            "color": [colours[expert] for _ in places for expert in range(experts)],
            "x": [
                round(0.001 + 0.998 * at / (len(places) - 1), 4)
                for at in range(len(places))
                for _ in names
            ],
            "y": middle_PE.round(4).ravel().tolist(),
            "customdata": [f"{label(name)}, layer {layer}" for layer in places for name in names],
            "hovertemplate": "%{customdata}: %{value:.1%}<extra></extra>",
            "pad": 10,
            "thickness": 12,
            "line": {"width": 0},
        },
        "link": {
            "source": source,
            "target": target,
            "value": value,
            "color": shade,
            "hovertemplate": "%{source.customdata} to %{target.customdata}: %{value:.1%}<extra></extra>",
        },
    }


def _middles(share_LEE: NDArray[Any]) -> NDArray[Any]:
    """Where each expert stands in each layer's column, experts in order: (L + 1, E)."""
    share_PE = numpy.concatenate([share_LEE.sum(-1), share_LEE[-1:].sum(-2)])
    ends_PE = share_PE.cumsum(-1)
    return numpy.clip(ends_PE - share_PE / 2, 0.001, 0.999)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{0.25 if colour == OTHER else 0.45})"
