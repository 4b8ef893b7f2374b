"""SparseGPT: prune group by group and let the columns to the right make up for the loss.

O out features, I in features, M columns of one group, P pairs of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moiety.experts.methods.problem import check_problem
from moiety.experts.methods.sweep import Sweep, surgeon_coupling
from moiety.experts.pattern import Pattern, highest

DAMPING = 0.01
BLOCK = 32
COMPARED_BY_PAIRS = 16

Choose = Callable[[Tensor, int, int], Tensor]


def sparsegpt(
    weight_OI: Tensor, gram_II: Tensor, pattern: Pattern, damping: float = DAMPING
) -> Tensor:
    """Prune by optimal brain surgery with one factorisation of the Gram matrix for all rows.

    Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1: whatever a group's cheapest weights
    leave behind, judged on the weights as already updated, is made up for by the columns right of
    them. The same arithmetic as published, arranged by halves (see `Sweep`). Input columns that
    calibration never excited are set to zero. A density chooses within blocks of 32 columns; a
    block's count is the mean of an even share and of the share that its weights have among the
    matrix's costliest before any update (the paper: even shares, 128 columns). `damping` is
    relative to each input's own energy (the paper: to the mean).
    """
    check_problem(weight_OI, gram_II)
    pattern.check_width(weight_OI.shape[1])
    if pattern.is_dense:
        return weight_OI.clone()
    coupling_II, price_I = surgeon_coupling(gram_II, damping)
    drift_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    drift_IO[gram_II.diagonal() <= 0] = 0
    value_IO = drift_IO.clone()
    sweep = Sweep(value_IO, drift_IO, coupling_II)
    choose = (
        _of_groups(pattern, value_IO)
        if pattern.group
        else _by_budget(pattern, drift_IO * price_I[:, None])
    )

    def visit(start: int, stop: int) -> None:
        score_MO = _reached(sweep, start, stop).mul_(price_I[start:stop, None]).abs_()
        keep_MO = choose(score_MO, start, stop)
        sweep.settle(start, stop, lambda column: value_IO[column].mul_(keep_MO[column - start]))

    sweep.run(pattern.group or BLOCK, visit)
    return value_IO.T.contiguous()


def _reached(sweep: Sweep, start: int, stop: int) -> Tensor:
    """The weights of a group as SparseGPT has updated them when it gets there (M, O).

    `value_IO` assumes that the columns before a column are settled; until those of the group
    itself are, its own coupling has to be undone.
    """
    block = slice(start, stop)
    value_MO, original_MO = sweep.value_IO[block], sweep.drift_IO[block]
    coupling_MM = sweep.coupling_II[block, block]
    undo_MM = torch.linalg.solve_triangular(
        coupling_MM.T,
        torch.eye(stop - start, dtype=coupling_MM.dtype, device=coupling_MM.device),
        upper=False,
        unitriangular=True,
    )
    return torch.addmm(original_MO, undo_MM, value_MO - original_MO)


def _of_groups(pattern: Pattern, value_IO: Tensor) -> Choose:
    if pattern.group > COMPARED_BY_PAIRS:
        return lambda score_MO, start, stop: highest(score_MO.T, pattern.kept).T.to(score_MO.dtype)
    return _by_pairs(pattern, value_IO)


def _by_pairs(pattern: Pattern, value_IO: Tensor) -> Choose:
    """Keep the highest of each group by comparing all pairs; ties go to the lower column.

    A weight is kept if fewer than `kept` others rank above it: the later ones that are higher,
    and the earlier ones that are not lower. Comparisons written as floats and counted by a
    matrix product are several times faster here than booleans.
    """
    group, rows = pattern.group, value_IO.shape[1]
    later_P, earlier_P = torch.tril_indices(group, group, -1, device=value_IO.device)
    pair_P = torch.arange(len(later_P), device=value_IO.device)
    sign_MP = value_IO.new_zeros(group, len(pair_P))
    sign_MP[later_P, pair_P] = 1
    sign_MP[earlier_P, pair_P] = -1
    behind_M1 = torch.arange(group - 1, -1, -1).to(value_IO)[:, None]
    above_MO = value_IO.new_empty(group, rows)
    ahead_PO = value_IO.new_empty(len(pair_P), rows)

    def choose(score_MO: Tensor, start: int, stop: int) -> Tensor:
        first = 0
        for column in range(1, group):
            pairs = slice(first, first + column)
            torch.ge(score_MO[:column], score_MO[column], out=ahead_PO[pairs])
            first += column
        torch.addmm(behind_M1, sign_MP, ahead_PO, out=above_MO)
        return above_MO.lt_(pattern.kept)

    return choose


def _by_budget(pattern: Pattern, cost_IO: Tensor) -> Choose:
    """Keep as many of each block as the budget says, so that the whole matrix has its exact count."""
    columns, rows = cost_IO.shape
    total = pattern.kept_columns(columns) * rows
    costliest_IO = highest(cost_IO.abs().reshape(1, -1), total).view_as(cost_IO)
    uneven_I = costliest_IO.sum(1).cumsum(0)
    even_I = torch.arange(1, columns + 1, device=cost_IO.device) * total // columns
    budget = [0, *((uneven_I + even_I) // 2).tolist()]

    def choose(score_MO: Tensor, start: int, stop: int) -> Tensor:
        kept = budget[stop] - budget[start]
        if kept in (0, score_MO.numel()):
            return torch.full_like(score_MO, float(kept > 0))
        return highest(score_MO.reshape(1, -1), kept).view_as(score_MO).to(score_MO.dtype)

    return choose
