"""Which neurons of an FFN matter, and how those that stay make up for those that go.

The neurons are the columns of the last matrix (down). D model width, F neurons, S of them kept.
"""

import torch
from torch import Tensor

from moiety.errors import InputError

ESCALATIONS = 5


def keep_neurons(down_DF: Tensor, gram_FF: Tensor, kept: int) -> Tensor:
    """Indices (S,), ascending, of the `kept` neurons that put most into the output.

    Neuron j puts in ‖w_j‖² G_jj: its column's size times what it sums up to on calibration text
    (`gram_FF`, the sum of x xᵀ). Optimal brain surgery on whole columns, which also asks what the
    others could make up for, gave a lower error on calibration text but not on held-out text.
    """
    share_F = down_DF.square().sum(0) * gram_FF.diagonal()
    return share_F.sort(descending=True, stable=True).indices[:kept].sort().values


def refit_columns(
    down_DF: Tensor, gram_FF: Tensor, kept_S: Tensor, damping: float = 0.01
) -> Tensor:
    """Least-squares columns (D, S) that give the whole matrix's output from the kept neurons.

    W_S + W_R G[R, S] (G[S, S] + damping)⁻¹ for the removed neurons R: ridge regression towards
    the columns as they are. The damping is relative to the Gram matrix's mean diagonal.
    """
    removed_DF = down_DF.clone()
    removed_DF[:, kept_S] = 0
    inverse_SS = damped_inverse(gram_FF[kept_S][:, kept_S], damping)
    return down_DF[:, kept_S] + removed_DF @ gram_FF[:, kept_S] @ inverse_SS


def column_error(down_DF: Tensor, changed_DS: Tensor, gram_FF: Tensor, kept_S: Tensor) -> float:
    """Output error on the calibration tokens, relative to the output's own size."""
    delta_DF = down_DF.clone()
    delta_DF[:, kept_S] -= changed_DS
    error = float(((delta_DF @ gram_FF) * delta_DF).sum())
    total = float(((down_DF @ gram_FF) * down_DF).sum())
    return error / total if total > 0 else 0.0


def damped_inverse(gram_SS: Tensor, damping: float) -> Tensor:
    """Inverse of a Gram matrix with `damping` times its mean diagonal added, in its own dtype.

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
            return torch.cholesky_inverse(lower_SS).to(gram_SS.dtype)
    raise InputError(
        "expected finite calibration activations, but no damping makes their Gram matrix "
        "positive definite; check the weights and the calibration text"
    )
