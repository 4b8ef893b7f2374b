"""One pass over a matrix's columns that hands each column's error on to the columns after it.

O out features, I in features. Matrices are held transposed, (I, O), so that a column of the
weight is contiguous.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.experts.methods.problem import check_finite

LEAF = 4
ESCALATIONS = 5


@dataclass(frozen=True)
class Sweep:
    """Settle columns from left to right, by halves.

    `value_IO` is what each column should be by itself, given all columns settled so far;
    `drift_IO` starts as the matrix that the sweep departs from and becomes, column by column,
    what was there minus what was settled. The part of `coupling_II` above its unit diagonal says
    how much of a column's drift each later column takes on. A half is settled before its drift
    is carried on, so almost all of the work is large matrix products.
    """

    value_IO: Tensor
    drift_IO: Tensor
    coupling_II: Tensor

    def run(self, group: int, visit: Callable[[int, int], object]) -> None:
        """Call `visit(start, stop)` on each run of `group` columns; it has to settle them."""
        self._halve(0, len(self.value_IO), group, visit)

    def settle(self, start: int, stop: int, decide: Callable[[int], object]) -> None:
        """Settle columns one by one; `decide(column)` makes `value_IO[column]` final in place."""

        def leaf(start: int, stop: int) -> None:
            for column in range(start, stop):
                decide(column)
                drift_O = self.drift_IO[column].sub_(self.value_IO[column])
                after = slice(column + 1, stop)
                if column + 1 < stop:
                    share_I1 = self.coupling_II[column, after, None]
                    self.value_IO[after].addcmul_(share_I1, drift_O)

        self._halve(start, stop, LEAF, leaf)

    def _halve(self, start: int, stop: int, unit: int, visit: Callable[[int, int], object]) -> None:
        if stop - start <= unit:
            visit(start, stop)
            return
        units = -(-(stop - start) // unit)
        middle = start + unit * (1 << (units - 1).bit_length() - 1)
        self._halve(start, middle, unit, visit)
        share_II = self.coupling_II[start:middle, middle:stop]
        self.value_IO[middle:stop].addmm_(share_II.T, self.drift_IO[start:middle])
        self._halve(middle, stop, unit, visit)


def surgeon_coupling(gram_II: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """How a surgeon's sweep couples columns (I, I), and the root of what each one costs (I,).

    Let H be the damped Gram matrix and H = R Rᵀ with R upper triangular. The factor U of
    SparseGPT and GPTQ, H⁻¹ = Uᵀ U, is R⁻¹. What they subtract from column j, Σ_{i<j} e_i U_ij
    with the scaled errors e, is minus Σ_{i<j} d_i R_ij / R_jj, where d_i is column i's original
    minus its settled weight; so H is factorised once and never inverted. Removing a weight w
    costs (w R_jj)².

    `damping` raises each diagonal entry by that share of itself, not of the mean diagonal as
    published, so that a few channels with huge activations do not drown all others. Columns that
    calibration never excited count as independent of the rest. Tries fp32, then fp64 with damping
    up to 10⁴ times larger. Raises InputError when even that fails, or for NaN or infinite
    activations.
    """
    check_finite(gram_II)
    attempts = [
        (torch.float32, damping),
        *((torch.float64, damping * 10**power) for power in range(ESCALATIONS)),
    ]
    for dtype, strength in attempts:
        factor_II, failed = _upper_factor(gram_II.to(dtype), strength)
        if not failed:
            price_I = factor_II.diagonal().clone()
            return factor_II.div_(price_I).to(gram_II.dtype), price_I.to(gram_II.dtype)
    raise InputError(
        f"expected a Gram matrix that damping makes positive definite, but damping "
        f"{damping * 10 ** (ESCALATIONS - 1):g} of its diagonal is not enough"
    )


def _upper_factor(gram_II: Tensor, damping: float) -> tuple[Tensor, bool]:
    """R with R Rᵀ the damped matrix, and whether there is none."""
    reversed_II = gram_II.flip(0, 1)
    diagonal_I = reversed_II.diagonal()
    diagonal_I.mul_(1 + damping)
    diagonal_I[diagonal_I <= 0] = 1
    lower_II, failed = torch.linalg.cholesky_ex(reversed_II)
    del reversed_II, diagonal_I
    return lower_II.flip(0, 1), bool(failed)
