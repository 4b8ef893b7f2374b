"""`python -m benchmarks [--quick] [--json FOLDER]`: the sparse kernels against their peers.

One matrix (2:4 and other patterns, for few tokens and for prompts of many), a routed block, and a
whole model; the tables say which targets are met, the end counts them. On a CPU with AMX everything
is also measured without it, as on one with AVX-512 only, and one matrix with AVX2 only. `--show
FOLDER` judges what was measured before. Pruning's benchmarks run on their own: `python -m
benchmarks.pruning`, `python -m benchmarks.prune_memory`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import tables
from moiety.experts.kernels.library import Isa, library

FOUR_OF_EIGHT, HALF = ("linear", "--pattern", "4:8"), ("linear", "--pattern", "0.5")
MANY = ("--tokens", "512,2048,8192", "--shapes", "4096x1024", "1024x4096")
SCRIPTS: dict[str, tuple[str, ...]] = {
    "linear": ("linear",),
    "linear-many": ("linear", *MANY),
    "linear-4of8": (*FOUR_OF_EIGHT, "--shapes", "4096x4096"),
    "linear-4of8-many": (*FOUR_OF_EIGHT, *MANY),
    "linear-half": (*HALF, "--shapes", "4096x4096"),
    "linear-half-many": (*HALF, *MANY),
    "moe_block": ("moe_block",),
    "decode": ("decode",),
}
QUICK = ("linear", "linear-4of8", "moe_block", "decode")
WITHOUT_AMX = ("--isa", "avx512", "--onednn-isa", "AVX512_CORE_BF16")
WITH_AVX2 = ("--isa", "avx2", "--onednn-isa", "AVX2")


def settings() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """What to measure with and which scripts, by the end of their files' names."""
    found, everything = library(), tuple(SCRIPTS)
    if found is None or found.best != Isa.AMX:
        return {"": ((), everything)}
    return {
        "-amx": ((), everything),
        "-avx512": (WITHOUT_AMX, everything),
        "-avx2": (WITH_AVX2, ("linear",)),
    }


def measure(folder: Path, quick: bool) -> list[Path]:
    """Each script in a process of its own, so that none inherits another's memory."""
    paths = []
    for ending, (options, names) in settings().items():
        for name in names:
            script, *rest = SCRIPTS[name]
            if quick and name not in QUICK:
                continue
            paths.append(folder / f"{name}{ending}.json")
            command = [sys.executable, "-m", f"benchmarks.{script}", *options]
            command += ["--quick", *rest[:2]] if quick else rest
            subprocess.run([*command, "--json", str(paths[-1])], check=True)
    return paths


def main() -> None:
    """Measure and judge, or only judge."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write each script's rows to this folder")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--show", type=Path, help="the tables of a folder's JSON; measure nothing")
    arguments = parser.parse_args()
    if arguments.show:
        paths = [path for path in sorted(arguments.show.glob("*.json")) if tables.has_table(path)]
        for path in paths:
            tables.show_file(path)
        tables.summary(paths)
        return
    with tempfile.TemporaryDirectory(prefix="moiety-bench-") as name:
        folder = arguments.json or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        tables.summary(measure(folder, arguments.quick))


if __name__ == "__main__":
    main()
