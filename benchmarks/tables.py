"""How results are shown, compared with their targets, and written."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import ratios
from moiety.experts import kernels
from moiety.experts.kernels.library import library
from moiety.files import write_json

Rows = Sequence[Mapping[str, Any]]


def isa() -> str:
    """The instruction set our kernels use here."""
    found = library()
    return "reference" if found is None else found.best.name.lower()


def device() -> str:
    """What was measured on."""
    threads, theirs = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"CPU, {threads} threads, torch {torch.__version__} ({theirs}), {kernels.description()}"


def row(
    case: str,
    tokens: int,
    kind: str,
    seconds: Mapping[str, float],
    targets: Mapping[str, Mapping[int, float]],
) -> dict[str, Any]:
    """One measurement of ours, `seconds[kind]`, beside those of its peers.

    `targets` are the least ratios by peer and number of tokens.
    """
    return {
        "case": case,
        "tokens": tokens,
        "values": kind,
        "seconds": seconds[kind],
        "ratio": ratios(seconds, kind),
        "target": {peer: least[tokens] for peer, least in targets.items() if tokens in least},
    }


def show(rows: Rows, title: str) -> None:
    """One table a group of peers: ratios first, then the target and our time."""
    console = Console()
    console.width = max(console.width, 130)
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row["ratio"]), []).append(row)
    for peers, members in groups.items():
        table = Table(title=f"{title}: their seconds / ours ({device()})", title_justify="left")
        for name in ("case", "tokens", "values", *peers, "at least", "our ms"):
            table.add_column(name, justify="left" if name == "case" else "right")
        for row in members:
            cells = [f"{row['ratio'][peer]:.2f}" for peer in peers]
            milliseconds = f"{row['seconds'] * 1e3:.2f}"
            start = (row["case"], str(row["tokens"]), row["values"])
            table.add_row(*start, *cells, verdict(row), milliseconds)
        console.print(table)


def verdict(row: Mapping[str, Any]) -> str:
    """Every target of a row and whether it is met."""
    found = []
    for peer, least in row.get("target", {}).items():
        met = "met" if row["ratio"][peer] >= least else "missed"
        found.append(f"{least:g} {peer} {met}")
    return ", ".join(found)


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes."""
    made = argparse.ArgumentParser(prog=f"benchmarks.{module}", description=description)
    made.add_argument("--json", type=Path, help="also write the rows to this file")
    made.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    return made


def write(rows: Rows, path: Path | None) -> None:
    """The rows as JSON, if a file was named."""
    if path:
        threads = torch.get_num_threads()
        head = {"device": device(), "threads": threads, "isa": isa()}
        write_json(path, {**head, "rows": list(rows)})
