"""Round kept weights to an integer grid while the columns to the right make up for the rounding.

O out features, I in features, C columns of one group, G groups of 128 columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.experts.kernels.reference import SCALE_COLUMNS
from moiety.experts.methods.problem import check_problem
from moiety.experts.methods.sweep import Sweep, surgeon_coupling

DAMPING = 0.01
SHRINKS = tuple(1 - step / 30 for step in range(20))
BITS = (4, 8)

Decide = Callable[[Tensor, int], object]


def quantise(
    weight_OI: Tensor,
    pruned_OI: Tensor,
    gram_II: Tensor,
    bits: int,
    mask_OI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Put the kept values of `pruned_OI` on a symmetric grid: whole multiples of their scale.

    Returns the matrix (O, I) in fp32 and its scales (O, G) in bf16, one a row for each 128
    columns. Codes go from -127 to 127 (`bits` 8) or from -7 to 7 (4). Kept are the entries where
    `mask_OI` is true, or else where `pruned_OI` is not zero; all others stay zero. `weight_OI`
    is the matrix whose outputs should be met: the dense one, or `pruned_OI` again if its values
    were trained for something else.

    Three parts. Scales: the best of 20 shrunk maxima for the group's rounding error, weighted by
    G's diagonal. Sweep: GPTQ (Frantar et al. 2022, arXiv:2210.17323) with the mask fixed, away
    from `pruned_OI`; see docs/pruning-methods.md for why not from the original. Polish: one pass
    of coordinate descent that gives each weight in turn the code with the least output error
    given all others. Raises InputError for other `bits`, dtypes or shapes and NaN activations.
    """
    check_problem(weight_OI, gram_II)
    if bits not in BITS:
        raise InputError(f"bits must be one of {', '.join(map(str, BITS))}, but it is {bits}")
    largest = 2 ** (bits - 1) - 1
    kept_OI = (pruned_OI != 0 if mask_OI is None else mask_OI).to(weight_OI.dtype)
    pruned_OI = pruned_OI * kept_OI
    scale_OG = _scales(pruned_OI, gram_II.diagonal().clamp_min(0), largest)
    decide = _rounding(scale_OG, kept_OI, largest)
    rounded_IO = _sweep(pruned_OI, gram_II, decide)
    return _polish(weight_OI, rounded_IO, gram_II, decide).T.contiguous(), scale_OG


def _scales(value_OI: Tensor, energy_I: Tensor, largest: int) -> Tensor:
    groups = zip(value_OI.split(SCALE_COLUMNS, 1), energy_I.split(SCALE_COLUMNS), strict=True)
    scales = [_scale(value_OC.contiguous(), energy_C, largest) for value_OC, energy_C in groups]
    return torch.stack(scales, 1)


def _scale(value_OC: Tensor, energy_C: Tensor, largest: int) -> Tensor:
    """The candidate that rounds a group with the least error (O,); 1 if the group is empty."""
    most_O = value_OC.abs().amax(1)
    best_O = torch.ones_like(most_O)
    least_O = torch.full_like(most_O, torch.inf)
    for shrink in SHRINKS:
        scale_O = (most_O * (shrink / largest)).bfloat16().to(value_OC.dtype)
        scale_O = torch.where(scale_O > 0, scale_O, 1)
        rounded_OC = value_OC / scale_O[:, None]
        rounded_OC.round_().clamp_(-largest, largest).mul_(scale_O[:, None])
        error_O = rounded_OC.sub_(value_OC).square_() @ energy_C
        best_O = torch.where(error_O < least_O, scale_O, best_O)
        least_O = torch.minimum(error_O, least_O)
    return best_O.bfloat16()


def _rounding(scale_OG: Tensor, kept_OI: Tensor, largest: int) -> Decide:
    scale_GO = scale_OG.T.to(kept_OI.dtype).contiguous()
    kept_IO = kept_OI.T.contiguous()

    def decide(value_O: Tensor, column: int) -> None:
        scale_O = scale_GO[column // SCALE_COLUMNS]
        value_O.div_(scale_O).round_().clamp_(-largest, largest)
        value_O.mul_(scale_O).mul_(kept_IO[column])

    return decide


def _sweep(pruned_OI: Tensor, gram_II: Tensor, decide: Decide) -> Tensor:
    coupling_II, _ = surgeon_coupling(gram_II, DAMPING)
    drift_IO = pruned_OI.T.clone(memory_format=torch.contiguous_format)
    value_IO = drift_IO.clone()
    sweep = Sweep(value_IO, drift_IO, coupling_II)
    sweep.settle(0, len(value_IO), lambda column: decide(value_IO[column], column))
    return value_IO


def _polish(weight_OI: Tensor, rounded_IO: Tensor, gram_II: Tensor, decide: Decide) -> Tensor:
    """Each weight once more, now knowing all others: a sweep coupled by G itself."""
    energy_I = gram_II.diagonal()
    energy_I = torch.where(energy_I > 0, energy_I, 1)
    value_IO = gram_II @ (weight_OI.T - rounded_IO)
    value_IO.div_(energy_I[:, None]).add_(rounded_IO)
    sweep = Sweep(value_IO, rounded_IO, gram_II / energy_I)
    sweep.settle(0, len(value_IO), lambda column: decide(value_IO[column], column))
    return value_IO
