"""The results as Markdown tables: loss and sparsity, method by method, order by order."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("method", "order", "coefficient", "held-out loss", "spread", "zeros", "follows pattern")


def tables(results: Mapping[str, Any]) -> str:
    """One table of controls and one for every pattern that was measured."""
    cells = list(results["cells"].values())
    parts = [_controls(results["controls"])]
    for pattern in dict.fromkeys(cell["pattern"] for cell in cells):
        rows = [_row(cell) for cell in cells if cell["pattern"] == pattern]
        parts.append(f"## {pattern}\n\n{_markdown(COLUMNS, rows)}")
    return "\n\n".join(parts)


def _controls(controls: Mapping[str, Any]) -> str:
    rows = [("base", f"{_mean(controls['base']):.4f}", f"{_mean(controls['base']):.4f}")]
    groups = {"dense finetunes": controls["dense"]}
    groups |= {f"sparse finetunes, {p}": losses for p, losses in controls["sparse"].items()}
    for name, losses in groups.items():
        own = statistics.mean(losses[domain][domain] for domain in losses)
        everywhere = statistics.mean(_mean(each) for each in losses.values())
        rows.append((name, f"{own:.4f}", f"{everywhere:.4f}"))
    return f"## Controls\n\n{_markdown(('model', 'own domain', 'all domains'), rows)}"


def _row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    losses = [_mean(run["losses"]) for run in cell["runs"]]
    swept = cell["swept"]
    return (
        cell["method"],
        cell["order"],
        f"{swept} {cell['value']:g}" if swept else "",
        f"{statistics.mean(losses):.4f}",
        f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "",
        f"{statistics.mean(run['zeros'] for run in cell['runs']):.2f}",
        f"{statistics.mean(run['followed'] for run in cell['runs']):.2f}",
    )


def _mean(losses: Mapping[str, float]) -> float:
    return statistics.mean(losses.values())


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but the first two columns aligned right."""
    rule = ["---", "---", *("---:" for _ in columns[2:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))
