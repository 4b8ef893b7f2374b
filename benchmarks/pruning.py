"""`python -m benchmarks.pruning [--quick] [--json FILE]`: pruning methods, time and error.

Every method against the published algorithm run plainly, column by column, in the same process
on the same matrix: seconds, and the relative output error `tr(ΔGΔᵀ) / tr(WGWᵀ)`. Weights are
random, inputs synthetic: a low-rank part, noise and a few outlier channels. Takes several minutes.

O out features, I in features, C columns of one block, M of one group, T tokens.
"""

import argparse
import json
from collections.abc import Callable, Sequence
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
            keep_OM = PATTERN.mask((weight_OC[:, group] / scale_C[group]).square())
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


def pruning_rows(shapes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Every method on every shape."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        weight_OI, gram_II = problem(*shape)
        fast, slow = contenders()
        found: dict[str, Tensor] = {}

        def timed(
            runs: dict[str, Prune],
            rounds: int,
            weight_OI: Tensor = weight_OI,
            gram_II: Tensor = gram_II,
            found: dict[str, Tensor] = found,
        ) -> dict[str, float]:
            def run(name: str, method: Prune) -> None:
                found[name] = method(weight_OI, gram_II)

            bound = {name: lambda n=name, m=method: run(n, m) for name, method in runs.items()}
            return interleaved(bound, rounds, warm_up=1 if rounds > 1 else 0)

        seconds = timed(fast, FAST_ROUNDS) | timed(slow, 1)
        errors = dict(
            zip(found, relative_errors(weight_OI, list(found.values()), gram_II), strict=True)
        )
        rows += [_row(name, shape, seconds, errors[name]) for name in seconds]
    return rows
