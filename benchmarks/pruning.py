"""`python -m benchmarks.pruning [--quick] [--json FILE]`: pruning methods, time and error.

`--shape 4096x4096 --only wanda,alps` measures less; the peer is always among it.

Every method against the published algorithm run plainly, column by column, in the same process
on the same matrix: seconds, and the relative output error `tr(ΔGΔᵀ) / tr(WGWᵀ)`. Weights are
random, inputs synthetic: a low-rank part, noise and a few outlier channels. Takes several minutes.

O out features, I in features, C columns of one block, M of one group, K kept of it, T tokens.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timing import interleaved, ratios
from moiety.experts import Pattern
from moiety.experts.methods import METHODS, quantise, refit, relative_errors
from moiety.files import write_json

PATTERN = Pattern(2, 4)
PEER = "plain_sparsegpt"
BLOCK = 128
DAMPING = 0.01
TOKENS = 8192
OUTLIERS = 16
SHAPES = ((4096, 4096), (14336, 4096))
QUICK_SHAPES = ((1024, 1024), (2048, 1024))
FAST_ROUNDS = 3

Prune = Callable[[Tensor, Tensor], Tensor]


def plain_sparsegpt(weight_OI: Tensor, gram_II: Tensor) -> Tensor:
    """SparseGPT (arXiv:2301.00774, algorithm 1) with its published arrangement of the work.

    The factor from Cholesky, inverse and Cholesky again; one column after the other within
    blocks of 128; the rest of the matrix updated after each block.
    """
    weight_OI, hessian_II = weight_OI.clone(), gram_II.clone()
    hessian_II.diagonal().add_(DAMPING * hessian_II.diagonal().mean())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    for start in range(0, weight_OI.shape[1], BLOCK):
        stop = start + BLOCK
        block_OC = weight_OI[:, start:stop].clone()
        error_OC = _plain_block(block_OC, factor_II[start:stop, start:stop])
        weight_OI[:, start:stop] = block_OC
        weight_OI[:, stop:] -= error_OC @ factor_II[start:stop, stop:]
    return weight_OI


def _plain_block(weight_OC: Tensor, factor_CC: Tensor) -> Tensor:
    """Prune one block in place; gives each column's scaled error."""
    error_OC = torch.zeros_like(weight_OC)
    scale_C = factor_CC.diagonal()
    keep_OM = torch.empty(0)
    for column in range(weight_OC.shape[1]):
        offset = column % PATTERN.group
        if offset == 0:
            group = slice(column, column + PATTERN.group)
            cost_OM = (weight_OC[:, group] / scale_C[group]).square()
            dearest_OK = cost_OM.topk(PATTERN.kept, dim=1).indices
            keep_OM = torch.zeros_like(cost_OM).scatter_(1, dearest_OK, 1)
        kept_O = weight_OC[:, column] * keep_OM[:, offset]
        error_O = (weight_OC[:, column] - kept_O) / scale_C[column]
        weight_OC[:, column] = kept_O
        error_OC[:, column] = error_O
        weight_OC[:, column + 1 :] -= torch.outer(error_O, factor_CC[column, column + 1 :])
    return error_OC


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A random weight (O, I) and the Gram matrix (I, I) of its synthetic inputs; always the same."""
    generator = torch.Generator().manual_seed(0)
    rank = columns // 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    input_TI = normal(TOKENS, rank) @ normal(rank, columns) / rank**0.5
    input_TI += 0.5 * normal(TOKENS, columns)
    scale_I = torch.rand(columns, generator=generator).exp()
    scale_I[torch.randperm(columns, generator=generator)[:OUTLIERS]] *= 20
    input_TI *= scale_I
    return normal(rows, columns) / columns**0.5, input_TI.T @ input_TI


def contenders() -> tuple[dict[str, Prune], dict[str, Prune]]:
    """Methods by name: those timed several times with the peer, and those timed once."""
    methods: dict[str, Prune] = {
        name: lambda weight_OI, gram_II, method=method: method(weight_OI, gram_II, PATTERN)
        for name, method in METHODS.items()
    }
    slow = {"alps": methods.pop("alps")}
    fast = {PEER: plain_sparsegpt, **methods}
    slow |= {f"{name}+refit": _refitted(methods[name]) for name in ("wanda", "sparsegpt")}
    slow |= {
        f"sparsegpt+refit+int{bits}": _quantised(slow["sparsegpt+refit"], bits) for bits in (8, 4)
    }
    return fast, slow


def _refitted(method: Prune) -> Prune:
    return lambda weight_OI, gram_II: refit(weight_OI, method(weight_OI, gram_II), gram_II)


def _quantised(method: Prune, bits: int) -> Prune:
    def run(weight_OI: Tensor, gram_II: Tensor) -> Tensor:
        return quantise(weight_OI, method(weight_OI, gram_II), gram_II, bits)[0]

    return run


def pruning_rows(
    shapes: Sequence[tuple[int, int]], only: Collection[str] = (), rounds: int = FAST_ROUNDS
) -> list[dict[str, Any]]:
    """Every method, or the named ones and the peer, on every shape."""
    return [row for shape in shapes for row in _rows_of(*shape, only, rounds)]


def _rows_of(
    rows: int, columns: int, only: Collection[str], fast_rounds: int
) -> list[dict[str, Any]]:
    weight_OI, gram_II = problem(rows, columns)
    found: dict[str, Tensor] = {}

    def timed(methods: dict[str, Prune], rounds: int, warm_up: int) -> dict[str, float]:
        def run(name: str) -> None:
            found[name] = methods[name](weight_OI, gram_II)

        runs = {name: lambda name=name: run(name) for name in methods}
        return interleaved(runs, rounds, warm_up)

    fast, slow = (_named(methods, only) for methods in contenders())
    seconds = timed(fast, fast_rounds, 1) | timed(slow, 1, 0)
    errors = relative_errors(weight_OI, list(found.values()), gram_II)
    return [
        {
            "case": name,
            "shape": [rows, columns],
            "pattern": str(PATTERN),
            "seconds": seconds[name],
            "ratio": ratios({PEER: seconds[PEER], name: seconds[name]}, name),
            "relative_error": error,
        }
        for name, error in zip(found, errors, strict=True)
    ]


def _named(methods: dict[str, Prune], only: Collection[str]) -> dict[str, Prune]:
    return {name: run for name, run in methods.items() if not only or name in (PEER, *only)}


def show(rows: list[dict[str, Any]], device: str) -> None:
    """One table a shape, ratio first."""
    console = Console()
    console.width = max(console.width, 110)
    for shape in sorted({tuple(row["shape"]) for row in rows}):
        name = f"{shape[0]} x {shape[1]}, {PATTERN}, {device}"
        table = Table(title=name, title_justify="left")
        table.add_column("method")
        for heading in (f"{PEER} s / its s", "relative error", "seconds"):
            table.add_column(heading, justify="right")
        for row in rows:
            if tuple(row["shape"]) == shape:
                ratio = row["ratio"].get(PEER, 1)
                cells = (f"{ratio:.2f}", f"{row['relative_error']:.5f}", f"{row['seconds']:.2f}")
                table.add_row(row["case"], *cells)
        console.print(table)


def _shape(text: str) -> tuple[int, int]:
    rows, columns = map(int, text.split("x"))
    return rows, columns


def main() -> None:
    """Run all, print the tables, write the JSON if asked."""
    parser = argparse.ArgumentParser(prog="benchmarks.pruning", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small matrices, under a minute")
    parser.add_argument("--shape", type=_shape, action="append", help="such as 4096x4096")
    parser.add_argument("--only", default="", help="methods, comma-separated")
    parser.add_argument("--rounds", type=int, default=FAST_ROUNDS, help="of the fast methods")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    isa = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    shapes = arguments.shape or (QUICK_SHAPES if arguments.quick else SHAPES)
    only = [name for name in arguments.only.split(",") if name]
    rows = pruning_rows(shapes, only, arguments.rounds)
    show(rows, f"CPU {isa}, {threads} threads")
    if arguments.json:
        write_json(arguments.json, {"device": "cpu", "threads": threads, "isa": isa, "rows": rows})


if __name__ == "__main__":
    main()
