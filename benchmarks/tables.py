"""How results are shown, compared with their targets, and written."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import ratios
from moiety.experts import kernels
from moiety.experts.kernels.library import Isa, library
from moiety.files import read_json, write_json

Rows = Sequence[Mapping[str, Any]]
ONEDNN_ISA = "ONEDNN_MAX_CPU_ISA"
MKL_ISA = "MKL_ENABLE_INSTRUCTIONS"
# What MKL calls oneDNN's instruction sets with bf16 products: attention in bf16 goes through them.
MKL_NAMES = {
    "AVX512_CORE_BF16": "AVX512_E3",
    "AVX512_CORE_FP16": "AVX512_E3",
    "AVX512_CORE_AMX": "AVX512_E4",
}


def isa() -> str:
    """The instruction set our kernels use here."""
    found = library()
    return "reference" if found is None else found.best.name.lower()


def machine() -> str:
    """Whose targets hold: `avx512_bf16` where bf16 is torch's fast dtype, else our kernels' name."""
    found = library()
    if found is None or Isa.AVX512_BF16 not in found.supported or found.best < Isa.AVX512:
        return isa()
    return "avx512_bf16"


def device() -> str:
    """What was measured on."""
    threads, theirs = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    if limit := os.environ.get(ONEDNN_ISA):
        theirs += f", oneDNN up to {limit}"
    if limit := os.environ.get(MKL_ISA):
        theirs += f", MKL up to {limit}"
    ours = f"torch {torch.__version__} ({theirs}), {kernels.description()}"
    return f"{_processor()}, {threads} threads, {ours}"


def _processor() -> str:
    """The CPU's name, as Linux gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "CPU")


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


def has_table(path: Path) -> bool:
    """Whether a file's rows are ours against peers': other benchmarks write theirs beside them."""
    rows = read_json(path).get("rows", [])
    return bool(rows) and {"case", "tokens", "values", "ratio", "seconds"} <= set(rows[0])


def show_file(path: Path) -> None:
    """The rows of a file that `write` wrote."""
    stored = read_json(path)
    show(stored["rows"], path.stem, stored["device"])


def show(rows: Rows, title: str, where: str | None = None) -> None:
    """One table a group of peers: ratios first, then the target and our time."""
    console = Console()
    console.width = max(console.width, 130)
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row["ratio"]), []).append(row)
    for peers, members in groups.items():
        table = Table(
            title=f"{title}: their seconds / ours ({where or device()})", title_justify="left"
        )
        for name in ("case", "tokens", "values", *peers, "at least", "our ms", "GB/s of"):
            table.add_column(name, justify="left" if name == "case" else "right")
        for row in members:
            cells = [f"{row['ratio'][peer]:.2f}" for peer in peers]
            milliseconds = f"{row['seconds'] * 1e3:.2f}"
            start = (row["case"], str(row["tokens"]), row["values"])
            speed = row.get("gigabytes_per_second")
            table.add_row(*start, *cells, verdict(row), milliseconds, _bandwidth(speed))
        console.print(table)


def _bandwidth(speed: Mapping[str, float] | float | None) -> str:
    """What a product read in a second, of what reading alone does where that was measured."""
    if isinstance(speed, Mapping):
        return f"{speed['own']:.1f} of {speed['read']:.1f}"
    return f"{speed:.0f}" if speed else ""


def verdict(row: Mapping[str, Any]) -> str:
    """Every target of a row and whether it is met."""
    found = []
    for peer, least in row.get("target", {}).items():
        met = "met" if row["ratio"][peer] >= least else "missed"
        found.append(f"{least:g} {peer} {met}")
    return ", ".join(found)


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes; `applied` puts the last two into force."""
    made = argparse.ArgumentParser(prog=f"benchmarks.{module}", description=description)
    made.add_argument("--json", type=Path, help="also write the rows to this file")
    made.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    made.add_argument("--isa", choices=[isa.name.lower() for isa in Isa], help="of our kernels")
    made.add_argument(
        "--onednn-isa",
        metavar="ISA",
        help="the most that torch's oneDNN may use, for instance AVX512_CORE_BF16: no AMX; "
        "its MKL keeps to the same generation",
    )
    return made


def applied(arguments: argparse.Namespace) -> argparse.Namespace:
    """The same, with oneDNN, MKL (before their first product) and our kernels as they were chosen."""
    if arguments.onednn_isa:
        os.environ[ONEDNN_ISA] = arguments.onednn_isa
        theirs: str = arguments.onednn_isa
        os.environ[MKL_ISA] = MKL_NAMES.get(theirs) or theirs.split("_")[0]
    found = library()
    if arguments.isa and found is not None:
        chosen = Isa[arguments.isa.upper()]
        if chosen not in found.supported:
            raise SystemExit(f"this CPU does not have {chosen.name}")
        found.best = chosen
    return arguments


def numbers(text: str) -> tuple[int, ...]:
    """What `1,8,64` and `4096x1024` name."""
    return tuple(int(part) for part in text.replace("x", ",").split(","))


def in_pieces(made: argparse.ArgumentParser) -> None:
    """Let a table be measured in pieces."""
    made.add_argument("--add", action="store_true", help="keep the file's other rows")


def write(rows: Rows, path: Path | None, *, add: bool = False) -> None:
    """The rows as JSON, if a file was named; with `add` in place of those it has of the same case."""
    if path is None:
        return
    head = {"device": device(), "threads": torch.get_num_threads(), "isa": isa()}
    kept: list[Mapping[str, Any]] = []
    if add and path.is_file():
        before = read_json(path)
        if {name: before[name] for name in head} != head:
            raise SystemExit(f"expected rows of {head['device']} in {path}, not {before['device']}")
        fresh = {_key(row) for row in rows}
        kept = [row for row in before["rows"] if _key(row) not in fresh]
    write_json(path, {**head, "rows": [*kept, *rows]})


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["tokens"], row["values"]


def summary(paths: Sequence[Path]) -> None:
    """How many targets the rows of some files meet, and which they miss."""
    console = Console(width=130)
    for path in paths:
        judged = [
            (row, peer, least)
            for row in read_json(path)["rows"]
            for peer, least in row.get("target", {}).items()
        ]
        missed = [one for one in judged if one[0]["ratio"][one[1]] < one[2]]
        console.print(f"{path.stem}: {len(judged) - len(missed)} of {len(judged)} targets met")
        for row, peer, least in missed:
            case = f"{row['case']}, {row['tokens']} tokens, {row['values']}"
            ratio = row["ratio"][peer]
            console.print(f"  missed: {case}: {ratio:.2f} against {peer}, at least {least:g}")


class Others:
    """How busy other processes kept this machine's CPUs since this was made."""

    def __init__(self) -> None:
        self._start = self._seconds()

    def share(self) -> float:
        """0 on an idle machine, 1 where others alone used every CPU; nan where it is not known."""
        [all_, busy, own] = (b - a for a, b in zip(self._start, self._seconds(), strict=True))
        return round(max(0.0, busy - own) / all_, 3) if all_ else math.nan

    def _seconds(self) -> tuple[float, float, float]:
        path = Path("/proc/stat")
        if not path.is_file():
            return 0.0, 0.0, 0.0
        ticks = [int(field) for field in path.read_text().splitlines()[0].split()[1:9]]
        times, tick = os.times(), os.sysconf("SC_CLK_TCK")
        own = times.user + times.system + times.children_user + times.children_system
        return sum(ticks) / tick, (sum(ticks) - ticks[3] - ticks[4]) / tick, own
