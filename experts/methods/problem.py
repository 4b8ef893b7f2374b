"""What every method is given, and the error that all of them are measured by.

O out features, I in features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moiety.errors import InputError


def check_problem(weight_OI: Tensor, gram_II: Tensor) -> None:
    """Raise InputError unless this is an fp32 matrix and the fp32 Gram matrix of its inputs."""
    for name, tensor in (("weight", weight_OI), ("Gram matrix", gram_II)):
        if tensor.dtype != torch.float32:
            raise InputError(f"expected an fp32 {name}, but it is {tensor.dtype}; call .float()")
    if weight_OI.ndim != 2 or gram_II.shape != (weight_OI.shape[1],) * 2:
        raise InputError(
            "expected a weight (O, I) and a Gram matrix (I, I), but they are "
            f"{tuple(weight_OI.shape)} and {tuple(gram_II.shape)}"
        )


def check_finite(gram_II: Tensor) -> None:
    """Raise InputError if calibration activations were NaN or infinite.

    Such an activation spoils its own entry of the diagonal, so only that is read.
    """
    if not bool(gram_II.diagonal().isfinite().all()):
        raise InputError(
            "expected finite calibration activations, but their Gram matrix holds NaN or infinity"
        )


def output_energy(weight_OI: Tensor, gram_II: Tensor) -> float:
    """`tr(W G Wᵀ)`: the squared norm of a matrix's outputs, summed over the calibration tokens."""
    return float(torch.linalg.vecdot(weight_OI @ gram_II, weight_OI).double().sum())


def relative_errors(
    weight_OI: Tensor, candidates: Sequence[Tensor], gram_II: Tensor
) -> list[float]:
    """Output error of each candidate on the calibration tokens, `tr(ΔGΔᵀ) / tr(WGWᵀ)`.

    One O x I x I product a candidate and one for all; 0 throughout if the outputs are all zero.
    """
    total = output_energy(weight_OI, gram_II)
    if total <= 0:
        return [0.0] * len(candidates)
    return [output_energy(weight_OI - candidate, gram_II) / total for candidate in candidates]


def relative_error(weight_OI: Tensor, pruned_OI: Tensor, gram_II: Tensor) -> float:
    """Output error of one candidate; see `relative_errors`."""
    return relative_errors(weight_OI, [pruned_OI], gram_II)[0]
