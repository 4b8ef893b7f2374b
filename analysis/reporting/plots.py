"""The kinds of plotly figure that reports use, without colours: the page adds those of its theme."""

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from moiety.analysis.charts import MARGINS, ROW_HEIGHT, label
from moiety.analysis.results import Interval

DIGITS = ".3~r"
"""d3's format of three significant digits, which tells small numbers from 0 and each other."""

MOST_LABELLED = 12
DIVERGING, GROWING = "diverging", "growing"
ACCENTS = ("first", "second", "third", "fourth")
"""Words that the page turns into colours of its theme."""


def layout(x: str, y: str, height: int) -> dict[str, Any]:
    """Axes with titles that cannot be zoomed."""
    return {
        "height": height,
        "margin": dict(MARGINS),
        "xaxis": {"title": {"text": x}, "fixedrange": True, "automargin": True},
        "yaxis": {"title": {"text": y}, "fixedrange": True, "automargin": True},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    }


def heatmap(
    pictures: Sequence[tuple[str, NDArray[Any]]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    form: str,
    x: str = "",
    y: str = "",
    limits: tuple[float, float] | None = None,
    scale: str = GROWING,
) -> dict[str, Any]:
    """A grid of numbers, one of `pictures` (name, rows x columns) at a time.

    `form` is a d3 format. A `diverging` scale is centred on 0, or on the middle of `limits`.
    """
    low, high = limits or _limits([picture for _, picture in pictures], scale)
    shown = [(name, _rounded(picture)) for name, picture in pictures]
    trace = {
        "type": "heatmap",
        "x": [label(name) for name in columns],
        "y": [label(name) for name in rows],
        "z": shown[0][1],
        "zmin": low,
        "zmax": high,
        "xgap": 1 if len(columns) > MOST_LABELLED else 2,
        "ygap": 1 if len(rows) > MOST_LABELLED else 2,
        "hovertemplate": f"%{{y}}, %{{x}}: %{{z:{form}}}<extra></extra>",
        "colorbar": {"tickformat": form, "thickness": 12, "outlinewidth": 0},
    }
    made = layout(x, y, 120 + min(640, len(rows) * (ROW_HEIGHT if len(rows) <= 10 else 14)))
    made["yaxis"] |= {"autorange": "reversed", "type": "category"}
    made["xaxis"] |= {"type": "category"}
    figure: dict[str, Any] = {"data": [trace], "layout": made, "scale": scale, "form": form}
    figure["labelled"] = len(columns) <= MOST_LABELLED and len(rows) <= MOST_LABELLED
    if len(shown) > 1:
        figure["choices"] = [{"name": name, "z": z} for name, z in shown]
    return figure


def _limits(pictures: Sequence[NDArray[Any]], scale: str) -> tuple[float, float]:
    values = numpy.concatenate([numpy.ravel(picture) for picture in pictures])
    values = values[numpy.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    if scale == DIVERGING:
        most = float(numpy.abs(values).max()) or 1.0
        return -most, most
    return min(0.0, float(values.min())), float(values.max()) or 1.0


def _rounded(picture: NDArray[Any]) -> list[list[float | None]]:
    return [[number(value) for value in row] for row in numpy.asarray(picture).tolist()]


def number(value: float) -> float | None:
    """As JSON has it: rounded, NaN as null."""
    return round(float(value), 5) if numpy.isfinite(value) else None


def curve(name: str, y: Sequence[float], **style: Any) -> dict[str, Any]:
    """A line over layers 0, 1, ..."""
    values = [number(value) for value in y]
    base = {"type": "scatter", "mode": "lines+markers", "name": name, "x": list(range(len(values)))}
    return {**base, "y": values, **style}


def band(name: str, low: Sequence[float], high: Sequence[float]) -> list[dict[str, Any]]:
    """The area between two lines over layers; nothing when neither is known."""
    if not numpy.isfinite(numpy.asarray([*low, *high], dtype=float)).any():
        return []
    quiet = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    return [
        curve("", low, showlegend=False, **quiet),
        curve(name, high, fill="tonexty", **quiet),
    ]


def over_layers(
    title: str, data: Sequence[dict[str, Any]], layers: int, form: str = DIGITS
) -> dict[str, Any]:
    """Lines by layer."""
    made = layout("layer", title, 300)
    made["yaxis"] |= {"rangemode": "tozero", "tickformat": form}
    ticks = {"dtick": 1} if layers <= 16 else {"nticks": 12}
    made["xaxis"] |= {**ticks, "range": [-0.3, layers - 0.7], "zeroline": False}
    made["margin"] = {**MARGINS, "t": 64}
    made["hovermode"] = "x unified"
    return {"data": list(data), "layout": made}


def bars(
    groups: Sequence[tuple[str, Sequence[Interval]]], names: Sequence[str], y: str
) -> dict[str, Any]:
    """Bars with their intervals, side by side for each name."""
    data = [
        {
            "type": "bar",
            "name": label(group),
            "x": [label(name) for name in names],
            "y": [number(one.value) for one in values],
            "accent": ACCENTS[at % len(ACCENTS)],
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": [number(one.high - one.value) for one in values],
                "arrayminus": [number(one.value - one.low) for one in values],
                "thickness": 1.5,
                "width": 4,
            },
        }
        for at, (group, values) in enumerate(groups)
    ]
    made = layout("", y, 320)
    made["xaxis"] |= {"type": "category"}
    made["margin"] = {**MARGINS, "t": 64}
    made["barmode"] = "group"
    made["showlegend"] = len(groups) > 1
    return {"data": data, "layout": made}
