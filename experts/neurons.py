"""Which neurons of an FFN matter, and how those that stay make up for those that go.

The neurons are the columns of the last matrix (down). D model width, F neurons, S of them kept.
"""

import torch
from torch import Tensor

from moiety.errors import InputError

ESCALATIONS = 5


def keep_neurons(
    down_DF: Tensor, gram_FF: Tensor, kept: int, rounds: int = 8, damping: float = 0.01
) -> Tensor:
    """Indices (S,), ascending, of the `kept` neurons whose lot the others' absence hurts least.

    Backward elimination by optimal brain surgery (Hassibi and Stork 1993) on whole columns: once
    the remaining weights have been refitted, dropping neuron j costs ‖w_j‖² / (G⁻¹)_jj, from
    which the damping's own share is taken, so that a neuron that never fires costs 0. Each of
    `rounds` rounds drops an equal share of those to go and refits. `gram_FF` is the sum of x xᵀ
    over what the neurons put out.
    """
    count = down_DF.shape[1]
    kept_S = torch.arange(count)
    for step in range(1, rounds + 1):
        left = count - (count - kept) * step // rounds
        if left == len(kept_S):
            continue
        inverse_SS, added = damped_inverse(gram_FF[kept_S][:, kept_S], damping)
        weight_DS = _solved(down_DF, gram_FF, kept_S, inverse_SS)
        own_S = (1 / inverse_SS.diagonal() - added).clamp_min(0)
        cost_S = weight_DS.square().sum(0) * own_S
        order_S = cost_S.sort(descending=True, stable=True).indices
        kept_S = kept_S[order_S[:left].sort().values]
    return kept_S


def refit_columns(
    down_DF: Tensor, gram_FF: Tensor, kept_S: Tensor, damping: float = 0.01
) -> Tensor:
    """Least-squares columns (D, S) that give the whole matrix's output from the kept neurons.

    W_S + W_R G[R, S] (G[S, S] + damping)⁻¹ for the removed neurons R: ridge regression towards
    the columns as they are. The damping is relative to the Gram matrix's mean diagonal.
    """
    inverse_SS, _ = damped_inverse(gram_FF[kept_S][:, kept_S], damping)
    return _solved(down_DF, gram_FF, kept_S, inverse_SS)


def _solved(down_DF: Tensor, gram_FF: Tensor, kept_S: Tensor, inverse_SS: Tensor) -> Tensor:
    removed_DF = down_DF.clone()
    removed_DF[:, kept_S] = 0
    return down_DF[:, kept_S] + removed_DF @ gram_FF[:, kept_S] @ inverse_SS


def column_error(down_DF: Tensor, changed_DS: Tensor, gram_FF: Tensor, kept_S: Tensor) -> float:
    """Output error on the calibration tokens, relative to the output's own size."""
    delta_DF = down_DF.clone()
    delta_DF[:, kept_S] -= changed_DS
    error = float(((delta_DF @ gram_FF) * delta_DF).sum())
    total = float(((down_DF @ gram_FF) * down_DF).sum())
    return error / total if total > 0 else 0.0


def damped_inverse(gram_SS: Tensor, damping: float) -> tuple[Tensor, float]:
    """Inverse of a Gram matrix with `damping` times its mean diagonal added, and that summand.

    Tries fp32, then fp64 with damping up to 10⁴ times larger. Raises InputError when even that
    fails, which takes NaN or infinite activations.
    """
    mean = gram_SS.diagonal().mean().clamp_min(torch.finfo(gram_SS.dtype).tiny)
    attempts = [(gram_SS.dtype, damping)]
    attempts += [(torch.float64, damping * 10**power) for power in range(ESCALATIONS)]
    for dtype, strength in attempts:
        damped_SS = gram_SS.to(dtype, copy=True)
        damped_SS.diagonal().add_(strength * mean.to(dtype))
        lower_SS, failed = torch.linalg.cholesky_ex(damped_SS)
        if not int(failed):
            inverse_SS = torch.cholesky_inverse(lower_SS).to(gram_SS.dtype)
            return inverse_SS, strength * float(mean)
    raise InputError(
        "expected finite calibration activations, but no damping makes their Gram matrix "
        "positive definite; check the weights and the calibration text"
    )
