"""Peak memory of composing four finetunes of a base of real shapes, against the models' bytes.

    python -m benchmarks.compose_memory [--json FILE] [--layers 18] [--kinds "mixture;ensemble"]

Writes a randomly initialised Llama (2048 / 5504, bf16; 1.04 B parameters with 18 blocks) and four
finetunes of it into a scratch folder, prunes them by magnitude, and composes them in a process of
its own for every kind, whose peak resident memory is read before and after. What only some
composites need is left out: choosing a shared part and learning gates, for which the composite
is opened, and the checks after a build, which need it and one dense model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.prune_memory import CONTEXT, MIB, peak, random_llama, write_text
from moiety.compose import Recipe
from moiety.compose.kinds import builder_of
from moiety.compose.routing import RoutingBuilder
from moiety.compose.stages import Stages
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.companions import copy_companions
from moiety.experts.shards import write_weights
from moiety.files import write_json

NAMES = ("one", "two", "three", "four")
KINDS: dict[str, dict[str, Any]] = {
    "mixture": {"kind": "mixture", "shared": "soup"},
    "routed": {"kind": "routed", "shared": "soup"},
    "routed, whole weights": {"kind": "routed", "base": "none", "shared": "soup"},
    "merge, shared mask": {"kind": "merge", "sparse": "shared_mask", "method": "linear"},
    "merge, pruned again": {"kind": "merge", "sparse": "reprune", "method": "ties"},
    "merge, conflict-aware": {"kind": "merge", "sparse": "conflict_aware", "method": "linear"},
    "ensemble": {"kind": "ensemble"},
}
PARAMETERS = {"linear": {"weight": 1.0}, "ties": {"weight": 1.0, "density": 0.5}}


def finetunes(folder: Path) -> None:
    """Write four models whose every matrix differs from the base's a little."""
    base = Checkpoint(folder / "base")

    def changed(number: int) -> Iterator[tuple[str, Tensor]]:
        for name in base:
            tensor = base[name]
            shift = (
                tensor.roll(number + 1, dims=0) if tensor.ndim == 2 else torch.zeros_like(tensor)
            )
            yield name, tensor.add(shift, alpha=0.01)

    for number, name in enumerate(NAMES):
        (folder / name).mkdir()
        write_weights(folder / name, changed(number))
        base.config.save_pretrained(folder / name)
        copy_companions(base.folder, folder / name)


def recipe_of(folder: Path, kind: str) -> Recipe:
    """The recipe of one kind; everything is pruned by magnitude, which looks at no text."""
    compose = dict(KINDS[kind])
    if compose["kind"] == "merge":
        compose["parameters"] = PARAMETERS[compose["method"]]
    return Recipe.model_validate(
        {
            "base": str(folder / "base"),
            "experts": [
                {"name": name, "model": str(folder / name), "domain": str(folder / "text.jsonl")}
                for name in NAMES
            ],
            "context_length": CONTEXT,
            "calibration_windows": 8,
            "prune": {"method": "magnitude", "refit_steps": 0},
            "compose": compose,
        }
    )


def child(folder: Path, kind: str, *, prune_only: bool) -> None:
    """Prune, or compose what is pruned, and print what the parent process reads."""
    builder = builder_of(recipe_of(folder, kind), Stages(folder / "stages"))
    if prune_only:
        _ = builder.experts
    before, start = peak(), time.perf_counter()
    out = folder / "out"
    if not prune_only:
        out.mkdir()
        if isinstance(builder, RoutingBuilder):
            builder.assemble(out, builder.shared_tensors, None)
        else:
            builder.write(out)
    values = {"seconds": time.perf_counter() - start, "peak": peak(), "before": before}
    print(json.dumps(values))


def run_child(folder: Path, kind: str, *, prune_only: bool) -> dict[str, Any]:
    """One step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.compose_memory", "--child", str(folder)]
    command += ["--kinds", kind, *(["--prune-only"] if prune_only else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(kinds: list[str], layers: int) -> dict[str, Any]:
    """Make the models, compose them in every way, put the figures together."""
    with tempfile.TemporaryDirectory(prefix="moiety-memory-") as name:
        folder = Path(name)
        (folder / "base").mkdir()
        sizes = random_llama(folder / "base", layers)
        write_text(folder / "text.jsonl", 8)
        finetunes(folder)
        rows: dict[str, Any] = {}
        for kind in kinds:
            run_child(folder, kind, prune_only=True)
            found = run_child(folder, kind, prune_only=False)
            written = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
            rows[kind] = {
                "own_peak_bytes": found["peak"] - found["before"],
                "composite_bytes": written,
                "seconds": found["seconds"],
            }
            subprocess.run(["rm", "-r", str(folder / "out")], check=True)
    return {
        "parameters": sizes["parameters"],
        "model_bytes": sizes["model"],
        "block_bytes": sizes["block"],
        "rows": rows,
    }


def main() -> None:
    """Measure, print a table, write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--kinds", help="separated by semicolons; default: all")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prune-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(";") if arguments.kinds else list(KINDS)
    if arguments.child:
        child(arguments.child, kinds[0], prune_only=arguments.prune_only)
        return
    found = measure(kinds, arguments.layers)
    title = f"peak memory of composing {len(NAMES)} finetunes of {found['parameters']:,} parameters"
    table = Table("kind", "own peak", "base and finetunes", "composite", title=title)
    everything = (1 + len(NAMES)) * found["model_bytes"]
    for kind, row in found["rows"].items():
        cells = (row["own_peak_bytes"], everything, row["composite_bytes"])
        table.add_row(kind, *(f"{cell / MIB:,.0f} MiB" for cell in cells))
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, {"threads": torch.get_num_threads(), **found})


if __name__ == "__main__":
    main()
