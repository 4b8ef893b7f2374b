"""Plotly figures of a routing summary, without colours: the page adds those of its theme.

L routed layers, E experts, D domains.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from moiety.analysis.statistics import RoutingSummary
from moiety.analysis.visible import visible_line

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")
"""Okabe and Ito's colours that stay apart for colour-blind readers, strongest first."""

OTHER = "#8A8A8A"
MOST_LABELLED_EXPERTS = 10
ROW_HEIGHT = 44
MARGINS = {"l": 56, "r": 16, "t": 12, "b": 48}


def label(text: str) -> str:
    """Text that plotly shows as text: it would read tags as markup."""
    return escape(visible_line(text), quote=False)


def expert_colours(summary: RoutingSummary) -> list[str]:
    """A colour for each expert: in order when they are few, else for the busiest; grey for the rest."""
    experts = len(summary.header.experts)
    if experts <= len(PALETTE):
        return list(PALETTE[:experts])
    busiest = summary.load_LE.mean(0).argsort()[::-1][: len(PALETTE)].tolist()
    chosen = dict(zip(sorted(busiest), PALETTE, strict=True))
    return [chosen.get(expert, OTHER) for expert in range(experts)]


def share_figure(summary: RoutingSummary) -> dict[str, Any]:
    """Heatmap domain x expert of mean routing weight; `choices` holds the mean and each layer."""
    domains = [label(name) for name in summary.header.domains]
    experts = [label(name) for name in summary.header.experts]
    pictures = [summary.share_DLE.mean(1), *summary.share_DLE.transpose(1, 0, 2)]
    trace = {
        "type": "heatmap",
        "x": experts,
        "y": domains,
        "z": pictures[0].round(4).tolist(),
        "zmin": 0,
        "zmax": round(max(picture.max() for picture in pictures), 4) or 1,
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "%{y} to %{x}: %{z:.1%}<extra></extra>",
        "colorbar": {"tickformat": ".0%", "thickness": 12, "outlinewidth": 0},
    }
    layout = _layout("expert", "", 120 + ROW_HEIGHT * len(domains))
    layout["yaxis"] |= {"autorange": "reversed", "automargin": True}
    layout["xaxis"] |= {"type": "category", "automargin": True}
    layers = [f"layer {layer}" for layer in range(len(summary.header.layers))]
    return {
        "data": [trace],
        "layout": layout,
        "labelled": len(experts) <= MOST_LABELLED_EXPERTS,
        "choices": [
            {"name": name, "z": picture.round(4).tolist()}
            for name, picture in zip(["mean over layers", *layers], pictures, strict=True)
        ],
    }


def information_figure(summary: RoutingSummary) -> dict[str, Any]:
    """NMI of each layer over the band that 95 % of relabelled documents stay under."""
    layers = list(range(len(summary.header.layers)))
    nulls = summary.nmi.layers
    band = [null.quantile_95 for null in nulls]
    data = [
        _line("95% of permutations below", layers, band, fill="tozeroy", line={"width": 0}),
        _line("observed", layers, [null.observed for null in nulls], line={"width": 2.5}),
    ]
    return {"data": data, "layout": _layer_layout("NMI", layers, percent=False)}


def own_share_figure(summary: RoutingSummary) -> dict[str, Any]:
    """Share of tokens first to their domain's expert, a line a domain, over chance."""
    layers = list(range(len(summary.header.layers)))
    colours = expert_colours(summary)
    data = [
        _line(
            label(domain),
            layers,
            summary.own_share_DL[summary.header.domains.index(domain)].tolist(),
            line={"color": colours[expert], "width": 2.5},
        )
        for domain, expert in summary.own_expert.items()
    ]
    chance = 1 / len(summary.header.experts)
    line = {"dash": "dot", "width": 1.5}
    data.append(_line("chance", layers, [chance] * len(layers), mode="lines", line=line))
    return {"data": data, "layout": _layer_layout("first to own expert", layers, percent=True)}


def _line(name: str, x: Sequence[int], y: Sequence[float], **style: Any) -> dict[str, Any]:
    values = [round(value, 5) for value in y]
    mode = "lines" if "fill" in style else "lines+markers"
    return {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": values, **style}


def _layer_layout(title: str, layers: Sequence[int], *, percent: bool) -> dict[str, Any]:
    layout = _layout("layer", title, 300)
    scale = {"range": [0, 1.02], "tickformat": ".0%"} if percent else {"tickformat": ".2f"}
    layout["yaxis"] |= {"rangemode": "tozero", **scale}
    ticks = {"dtick": 1} if len(layers) <= 16 else {"nticks": 12}
    layout["xaxis"] |= {**ticks, "range": [-0.3, len(layers) - 0.7], "zeroline": False}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    layout["margin"] = {**MARGINS, "t": 64}
    layout["hovermode"] = "x unified"
    return layout


def _layout(x: str, y: str, height: int) -> dict[str, Any]:
    return {
        "height": height,
        "margin": dict(MARGINS),
        "xaxis": {"title": {"text": x}, "fixedrange": True},
        "yaxis": {"title": {"text": y}, "fixedrange": True},
    }
