"""`python -m benchmarks.gpu_tune [--values ...] [--tokens ...] [--json FILE]`: how to cut products.

Every candidate of `candidates` on the matrices of one 4096 x 14336 expert; the best of each kind of
values, product and number of tokens are the rows of `experts/kernels/cuda/choose.py`. Candidates are
compiled in as many processes as there are cores, then timed in this one.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import gpu_timing, tables
from benchmarks.gpu_experts import EXPERT_WIDTH, WIDTH, nbytes, random_planes
from moiety.experts import kernels
from moiety.experts.kernels import Weights
from moiety.experts.kernels.cuda.choose import Choice
from moiety.files import write_json

Candidate = tuple[str, bool, Choice, int]
SHAPES = {True: (2 * EXPERT_WIDTH, WIDTH), False: (WIDTH, EXPERT_WIDTH)}
PARTS = {True: (1,), False: (4, 7)}
KINDS, BLOCKS = ("bf16", "int8", "int4"), (8, 16, 32, 64, 128)


def candidates(values: Sequence[str], blocks: Sequence[int]) -> Iterator[Candidate]:
    """Kind of values, whether gated, how it is cut, parts of the columns."""
    for kind in values:
        for block in blocks:
            for rows, warps, sharing in _cuts(block):
                for stages in (2, 3) if block >= 64 else (2, 3, 4):
                    for gated in (True, False):
                        choice = Choice(rows, block, warps, sharing, stages)
                        for parts in PARTS[gated] if stages == 3 else PARTS[gated][:1]:
                            yield kind, gated, choice, parts


def _cuts(tokens: int) -> list[tuple[int, int, int]]:
    if tokens == 8:
        return [(32, 2, 1), (32, 4, 2), (64, 2, 1), (64, 4, 1), (64, 4, 2), (128, 4, 1)]
    if tokens == 16:
        wide = [(128, 2, 1), (256, 4, 1), (256, 8, 1)]
        return [(32, 2, 1), (64, 2, 1), (64, 4, 1), (64, 4, 2), (64, 8, 2), (128, 4, 1), *wide]
    return [(64, 2, 1), (64, 4, 1), (128, 4, 1), (128, 8, 1), (256, 8, 1)]


def run(candidate: Candidate, weights: Weights, input: torch.Tensor) -> torch.Tensor:
    """One product, cut so."""
    _, gated, choice, parts = candidate
    gpu = kernels.gpu_kernels(torch.device("cuda"))
    assert gpu is not None
    activation = "silu" if gated else None
    return gpu.product(input, weights, choice, parts=parts, activation=activation)


def tokens(choice: Choice, weights: Weights) -> torch.Tensor:
    """As many random tokens as a program takes."""
    return torch.randn(choice.tokens, weights.columns, device="cuda").bfloat16()


def compile_share(found: Sequence[Candidate], worker: int, workers: int) -> None:
    """Run every so-many-th candidate once, which leaves it in Triton's cache."""
    for candidate in found[worker::workers]:
        kind, gated, choice, _ = candidate
        weights = random_planes(1, *SHAPES[gated], kind)
        try:
            run(candidate, weights, tokens(choice, weights))
        except Exception as error:
            sys.stderr.write(f"{candidate}: {type(error).__name__}\n")


def timed(found: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Seconds of every candidate."""
    rows = []
    for kind in dict.fromkeys(candidate[0] for candidate in found):
        for gated in (True, False):
            one = random_planes(1, *SHAPES[gated], kind)
            turns = gpu_timing.copies(nbytes(one))
            stacks = [one, *(random_planes(1, *SHAPES[gated], kind) for _ in range(turns - 1))]
            for candidate in found:
                if candidate[:2] == (kind, gated):
                    rows += _timed(candidate, stacks)
    return rows


def _timed(candidate: Candidate, stacks: list[Weights]) -> list[dict[str, Any]]:
    kind, gated, choice, parts = candidate
    turns, input = len(stacks), tokens(choice, stacks[0])

    def call(turn: int) -> torch.Tensor:
        return run(candidate, stacks[turn % turns], input)

    try:
        seconds = gpu_timing.interleaved({"ours": call}, 2 * turns, rounds=5)["ours"]
    except Exception as error:
        sys.stderr.write(f"{candidate}: {type(error).__name__}\n")
        return []
    row = {"values": kind, "gated": gated, **asdict(choice), "parts": parts, "seconds": seconds}
    return [row]


def main() -> None:
    """Compile all, time all, print the best of each."""
    parser = tables.parser("gpu_tune", __doc__)
    parser.add_argument("--values", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--tokens", nargs="+", type=int, default=BLOCKS, choices=BLOCKS)
    parser.add_argument("--worker", type=int)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("expected an NVIDIA GPU, but torch sees none; run this where there is one")
    found = list(candidates(arguments.values, arguments.tokens))
    if arguments.worker is not None:
        compile_share(found, arguments.worker, arguments.workers)
        return
    command = [sys.executable, "-m", "benchmarks.gpu_tune", "--workers", str(arguments.workers)]
    command += ["--values", *arguments.values, "--tokens", *map(str, arguments.tokens)]
    numbers = range(arguments.workers)
    started = [subprocess.Popen([*command, "--worker", str(number)]) for number in numbers]
    for process in started:
        process.wait()
    rows = timed(found)
    keys = sorted({(row["values"], row["gated"], row["tokens"]) for row in rows})
    for key in keys:
        same = [r for r in rows if (r["values"], r["gated"], r["tokens"]) == key]
        best = sorted(same, key=lambda row: row["seconds"])[:3]
        shown = [
            (row["rows"], row["warps"], row["sharing"], row["stages"], row["parts"]) for row in best
        ]
        times = [round(row["seconds"] * 1e6, 1) for row in best]
        print(key, *zip(times, shown, strict=True))
    if arguments.json:
        write_json(arguments.json, {**gpu_timing.card(), "rows": rows})


if __name__ == "__main__":
    main()
