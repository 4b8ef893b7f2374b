"""The results as one picture, an SVG: loss of every method in every order, a panel a pattern.

python -m experiments.merging_sparse_experts.plot results.json --out merging-results.svg
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moiety.files import read_json, write_text

COLOURS = {
    "dense merge": "#666666",
    "prune, then merge": "#d62728",
    "merge, then prune": "#1f77b4",
    "shared mask": "#ff7f0e",
    "sparse deltas": "#2ca02c",
    "conflict-aware deltas": "#9467bd",
}
LOWEST, HIGHEST = 3.80, 4.10
LEFT, WIDTH, ROW, TOP, GAP = 130, 560, 22, 60, 62
TICKS = (3.80, 3.85, 3.90, 3.95, 4.00, 4.05, 4.10)


def picture(results: Mapping[str, Any]) -> str:
    """The SVG: panels below each other, the losses of controls as upright lines."""
    cells = list(results["cells"].values())
    patterns = [p for p in dict.fromkeys(cell["pattern"] for cell in cells) if p != "dense"]
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    height = TOP + len(patterns) * (ROW * len(methods) + GAP)
    parts = [*_legend()]
    for number, pattern in enumerate(patterns):
        top = TOP + number * (ROW * len(methods) + GAP)
        chosen = [cell for cell in cells if cell["pattern"] in (pattern, "dense")]
        parts += _panel(pattern, chosen, methods, results["controls"], top)
    size = f'width="{LEFT + WIDTH + 40}" height="{height}"'
    style = 'font-family="sans-serif" font-size="12"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', background, *parts, "</svg>\n"]
    )


def _legend() -> Iterator[str]:
    for number, (order, colour) in enumerate(COLOURS.items()):
        across, down = LEFT + number % 3 * 190, 16 + number // 3 * 18
        yield f'<circle cx="{across}" cy="{down}" r="4" fill="{colour}"/>'
        yield f'<text x="{across + 9}" y="{down + 4}">{order}</text>'


def _panel(
    pattern: str,
    cells: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    controls: Mapping[str, Any],
    top: int,
) -> Iterator[str]:
    bottom = top + ROW * len(methods)
    yield f'<text x="4" y="{top - 4}" font-weight="bold">{pattern}</text>'
    for tick in TICKS:
        yield f'<line x1="{_x(tick)}" x2="{_x(tick)}" y1="{top}" y2="{bottom}" stroke="#e0e0e0"/>'
        yield f'<text x="{_x(tick)}" y="{bottom + 14}" text-anchor="middle">{tick:.2f}</text>'
    base, sparse = statistics.mean(controls["base"].values()), controls["sparse"][pattern]
    yield from _upright("base", base, top, bottom, "middle")
    yield from _upright("finetunes", _at_home(controls["dense"]), top, bottom, "end")
    yield from _upright("sparse", _at_home(sparse), top, bottom, "start")
    for number, method in enumerate(methods):
        middle = top + ROW * number + ROW // 2
        yield f'<text x="4" y="{middle + 4}">{method}</text>'
        for cell in (cell for cell in cells if cell["method"] == method):
            yield from _mark(cell, middle)


def _upright(name: str, loss: float, top: int, bottom: int, anchor: str) -> Iterator[str]:
    across = _x(loss)
    line = f'x1="{across}" x2="{across}" y1="{top}" y2="{bottom}"'
    yield f'<line {line} stroke="black" stroke-dasharray="3 3"/>'
    yield f'<text x="{across}" y="{top - 4}" text-anchor="{anchor}" font-size="10">{name}</text>'


def _mark(cell: Mapping[str, Any], middle: int) -> Iterator[str]:
    """A dot, or, of what lies beyond the right edge, an arrow there and the number."""
    loss = statistics.mean(statistics.mean(run["losses"].values()) for run in cell["runs"])
    colour, place = COLOURS[cell["order"]], _x(min(loss, HIGHEST))
    if loss <= HIGHEST:
        yield f'<circle cx="{place}" cy="{middle}" r="4" fill="{colour}" fill-opacity="0.8"/>'
        return
    points = f"{place},{middle - 5} {place + 8},{middle} {place},{middle + 5}"
    yield f'<polygon points="{points}" fill="{colour}"/>'
    yield f'<text x="{place + 10}" y="{middle + 4}" font-size="10">{loss:.2f}</text>'


def _at_home(losses: Mapping[str, Mapping[str, float]]) -> float:
    return statistics.mean(losses[domain][domain] for domain in losses)


def _x(loss: float) -> float:
    return round(LEFT + (loss - LOWEST) / (HIGHEST - LOWEST) * WIDTH, 1)


def main() -> None:
    """Read the results, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_text(arguments.out, picture(read_json(arguments.results)))


if __name__ == "__main__":
    main()
