"""Peak memory of composing four finetunes of a base of real shapes, against the models' bytes.

    python -m benchmarks.compose_memory [--json FILE] [--layers 18] [--kinds "mixture;ensemble"]

Writes a randomly initialised Llama (2048 / 5504, bf16; 1.04 B parameters with 18 blocks) and a
finetune of it into a scratch folder, packs that by magnitude and copies both until there are four
(their values do not matter here, their bytes do). Every kind is then composed in a process of its
own, whose peak resident memory is read before and after. Left out is what needs a model in memory:
choosing a shared part and learning gates need the composite, the checks after a build one dense
model beside it. Resident memory counts pages of the files that are read, too.
"""

import argparse
import contextlib
import json
import shutil
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

from benchmarks.memory import peak
from benchmarks.prune_memory import CONTEXT, MIB, random_llama, write_text
from moiety.compose import Recipe
from moiety.compose.kinds import builder_of
from moiety.compose.merged.packed import modules_at, write_packed
from moiety.compose.routing import RoutingBuilder
from moiety.compose.stages import Stages
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.companions import copy_companions
from moiety.experts.pattern import Pattern
from moiety.experts.shards import write_weights
from moiety.files import read_json, write_json

NAMES = ("one", "two", "three", "four")
SIZES = "sizes.json"
PRUNE = {"method": "magnitude", "refit_steps": 0}
KINDS: dict[str, dict[str, Any]] = {
    "mixture": {"kind": "mixture", "shared": "soup"},
    "routed": {"kind": "routed", "shared": "soup"},
    "ensemble": {"kind": "ensemble"},
    "merge": {
        "kind": "merge",
        "sparse": "conflict_aware",
        "method": "linear",
        "parameters": {"weight": 1.0},
    },
}


def make_models(folder: Path, layers: int) -> dict[str, int]:
    """Write the base and its finetunes; gives bytes of a block and of a model."""
    if (folder / SIZES).is_file():
        return read_json(folder / SIZES)
    (folder / "base").mkdir(parents=True)
    sizes = random_llama(folder / "base", layers)
    write_text(folder / "text.jsonl", 8)
    base = Checkpoint(folder / "base")

    def changed() -> Iterator[tuple[str, Tensor]]:
        for name in base:
            tensor = base[name]
            yield name, tensor.add(tensor.roll(1, dims=0), alpha=0.01)

    (folder / NAMES[0]).mkdir()
    write_weights(folder / NAMES[0], changed())
    base.config.save_pretrained(folder / NAMES[0])
    copy_companions(base.folder, folder / NAMES[0])
    for name in NAMES[1:]:
        shutil.copytree(folder / NAMES[0], folder / name)
    write_json(folder / SIZES, sizes)
    return sizes


def recipe_of(folder: Path, kind: str) -> Recipe:
    """The recipe of one kind; everything is pruned by magnitude, which looks at no text."""
    return Recipe.model_validate(
        {
            "base": str(folder / "base"),
            "experts": [
                {"name": name, "model": str(folder / name), "domain": str(folder / "text.jsonl")}
                for name in NAMES
            ],
            "context_length": CONTEXT,
            "calibration_windows": 8,
            "prune": PRUNE,
            "compose": KINDS[kind],
        }
    )


def prune_one(folder: Path, recipe: Recipe, out: Path, *, delta: bool) -> None:
    """Keep the two largest of every four weights, or differences to the base, of one finetune."""
    base, finetune = Checkpoint(folder / "base"), Checkpoint(folder / NAMES[0])
    settings, modules = recipe.prune_settings(), modules_at(base.config, recipe.sites)
    pattern, packed = Pattern.parse(settings.pattern), {f"{module}.weight" for module in modules}

    def tensors() -> Iterator[tuple[str, tuple[Tensor, Tensor | None]]]:
        for name in finetune:
            if name not in packed:
                yield name, (finetune[name], None)
                continue
            weight_OI = finetune[name].float() - (base[name].float() if delta else 0)
            mask_OI = pattern.mask(weight_OI.abs())
            yield name, (weight_OI * mask_OI, mask_OI)

    out.mkdir()
    write_packed(out, base, tensors(), modules, settings, task_vector=delta)


def child(folder: Path, kind: str, *, prune_only: bool) -> None:
    """Prune one finetune and copy it, or compose; print what the parent process reads."""
    recipe = recipe_of(folder, kind)
    builder = builder_of(recipe, Stages(folder / "stages"))
    pruned = {name: folder / f"{kind}-{name}" for name in NAMES}
    if prune_only:
        first, *others = pruned.values()
        prune_one(folder, recipe, first, delta=builder.pruned_from is not None)
        for other in others:
            shutil.copytree(first, other)
        return
    if kind != "merge":
        builder.experts = pruned
    before, start = peak(), time.perf_counter()
    out = folder / "out"
    out.mkdir()
    if isinstance(builder, RoutingBuilder):
        builder.assemble(out, builder.shared_tensors, None)
    else:
        builder.write(out)
    values = {"seconds": time.perf_counter() - start, "peak": peak(), "before": before}
    print(json.dumps(values))


def run_child(folder: Path, kind: str, *more: str) -> str:
    """What one step, in a process of its own, prints last."""
    command = [sys.executable, "-m", "benchmarks.compose_memory", "--child", str(folder)]
    done = subprocess.run(
        [*command, "--kinds", kind, *more], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip().rpartition("\n")[2]


def measure(kinds: list[str], layers: int, keep: Path | None) -> dict[str, Any]:
    """Make the models, compose them in every way, put the figures together."""
    with contextlib.ExitStack() as stack:
        scratch = tempfile.TemporaryDirectory(prefix="moiety-memory-")
        folder = Path(stack.enter_context(scratch)) if keep is None else keep
        sizes = make_models(folder, layers)
        rows: dict[str, Any] = {}
        for kind in kinds:
            if kind != "merge" and not (folder / f"{kind}-{NAMES[-1]}").is_dir():
                run_child(folder, kind, "--prune-only")
            found = json.loads(run_child(folder, kind))
            written = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
            rows[kind] = {
                "own_peak_bytes": found["peak"] - found["before"],
                "composite_bytes": written,
                "seconds": found["seconds"],
            }
            print(kind, rows[kind], file=sys.stderr, flush=True)
            shutil.rmtree(folder / "out")
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
    parser.add_argument("--folder", type=Path, help="keep the models here for another run")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prune-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(";") if arguments.kinds else list(KINDS)
    if arguments.child:
        child(arguments.child, kinds[0], prune_only=arguments.prune_only)
        return
    found = measure(kinds, arguments.layers, arguments.folder)
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
