"""SparseGPT: prune column by column and let the columns to the right make up for the loss.

O out features, I in features, C columns of one block.
"""

import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.experts.pattern import Pattern

BLOCK = 128


def sparsegpt(
    weight_OI: Tensor, gram_II: Tensor, pattern: Pattern, damping: float = 0.01
) -> Tensor:
    """Prune by optimal brain surgery with a shared inverse Hessian.

    Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1: in every group the weights with the
    least `w² / U_jj²` go, judged on the weights as already updated, and each column's error,
    divided by `U_jj`, is subtracted from the columns right of it along row j of U, the upper
    Cholesky factor of the inverse Hessian. Input columns that calibration never excited are set
    to zero. `damping` is relative to the Hessian's mean diagonal.
    """
    pattern.check_width(weight_OI.shape[1])
    weight_OI = weight_OI.clone()
    weight_OI[:, gram_II.diagonal() <= 0] = 0
    factor_II = inverse_factor(gram_II, damping)
    step = BLOCK - BLOCK % pattern.group or pattern.group
    for start in range(0, weight_OI.shape[1], step):
        stop = min(start + step, weight_OI.shape[1])
        block_OC, error_OC = _sweep(
            weight_OI[:, start:stop], factor_II[start:stop, start:stop], pattern
        )
        weight_OI[:, start:stop] = block_OC
        weight_OI[:, stop:] -= error_OC @ factor_II[start:stop, stop:]
    return weight_OI


def _sweep(weight_OC: Tensor, factor_CC: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune one block group by group; also gives each column's scaled error for later blocks."""
    weight_OC = weight_OC.clone()
    error_OC = torch.zeros_like(weight_OC)
    scale_C = factor_CC.diagonal()
    for start in range(0, weight_OC.shape[1], pattern.group):
        stop = start + pattern.group
        group_OM = weight_OC[:, start:stop]
        keep_OM = pattern.mask((group_OM / scale_C[start:stop]).square())
        for column in range(start, stop):
            kept_O = weight_OC[:, column] * keep_OM[:, column - start]
            error_O = (weight_OC[:, column] - kept_O) / scale_C[column]
            weight_OC[:, column] = kept_O
            error_OC[:, column] = error_O
            weight_OC[:, column + 1 : stop] -= torch.outer(
                error_O, factor_CC[column, column + 1 : stop]
            )
        weight_OC[:, stop:] -= error_OC[:, start:stop] @ factor_CC[start:stop, stop:]
    return weight_OC, error_OC


def inverse_factor(gram_II: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped inverse of a Gram matrix.

    Tries fp32, then fp64 with damping up to 10⁴ times larger. Raises InputError when even that
    fails, which takes NaN or infinite activations.
    """
    if not bool(gram_II.isfinite().all()):
        raise InputError(
            "expected finite calibration activations, but their Gram matrix holds NaN or infinity"
        )
    diagonal_I = gram_II.diagonal()
    dead_I = diagonal_I <= 0
    mean = diagonal_I[~dead_I].mean() if bool((~dead_I).any()) else gram_II.new_ones(())
    attempts = [(torch.float32, damping), *((torch.float64, damping * 10**k) for k in range(5))]
    for dtype, strength in attempts:
        damped_II = gram_II.to(dtype, copy=True)
        damped_II.diagonal()[dead_I] = mean.to(dtype)
        damped_II.diagonal().add_(strength * mean.to(dtype))
        factor_II = _factor(damped_II)
        if factor_II is not None:
            return factor_II.to(gram_II.dtype)
    raise InputError(
        f"expected a Gram matrix that damping makes positive definite, but damping "
        f"{damping * 10**4:g} of its mean diagonal is not enough"
    )


def _factor(damped_II: Tensor) -> Tensor | None:
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if int(failed):
        return None
    factor_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
    sound = not int(failed) and bool(factor_II.isfinite().all())
    return factor_II if sound else None
