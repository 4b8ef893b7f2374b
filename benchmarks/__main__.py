"""`python -m benchmarks [--json FILE]`: every benchmark, a table and the same as JSON."""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sparse_ops import block_rows, linear_rows
from moiety.files import write_json


def show(rows: list[dict[str, Any]], device: str) -> None:
    """One table a group of peers, ratio first."""
    console = Console()
    console.width = max(console.width, 110)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row["ratio"]), []).append(row)
    for peers, members in groups.items():
        table = Table(title=f"dense seconds / our seconds ({device})", title_justify="left")
        for name in ("case", "tokens", *peers, "our ms"):
            table.add_column(name, justify="left" if name == "case" else "right")
        for row in members:
            cells = [f"{row['ratio'][peer]:.2f}" for peer in peers]
            milliseconds = f"{row['seconds'] * 1e3:.2f}"
            table.add_row(row["case"], str(row["tokens"]), *cells, milliseconds)
        console.print(table)


def main() -> None:
    """Run all, print the tables, write the JSON if asked."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    isa = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    rows = [*linear_rows(), *block_rows()]
    show(rows, f"CPU {isa}, {threads} threads")
    if arguments.json:
        write_json(arguments.json, {"device": "cpu", "threads": threads, "isa": isa, "rows": rows})


if __name__ == "__main__":
    main()
