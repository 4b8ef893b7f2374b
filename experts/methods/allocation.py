"""OWL: give blocks with more outliers a higher density.

O out features, I in features.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.experts.methods.saliency import wanda_score

LEAST_DENSITY = 0.01
HALVINGS = 60


def outlier_share(pairs: Iterable[tuple[Tensor, Tensor]], multiple: float = 5.0) -> float:
    """Share of a block's weights whose Wanda score is over `multiple` times the block's mean.

    `pairs` are the block's weights (O, I) and the Gram matrices (I, I) of their inputs. Yin et
    al. 2023, arXiv:2310.05175, equation 1.
    """
    scores = [wanda_score(weight_OI, gram_II) for weight_OI, gram_II in pairs]
    weights = sum(score_OI.numel() for score_OI in scores)
    if not weights:
        raise InputError("expected a block with at least one matrix, but there is none")
    mean = sum(float(score_OI.double().sum()) for score_OI in scores) / weights
    return sum(int((score_OI > multiple * mean).sum()) for score_OI in scores) / weights


def owl_densities(
    shares: Sequence[float],
    density: float,
    spread: float = 0.08,
    sizes: Sequence[int] | None = None,
) -> list[float]:
    """A density for each block, in the order of their outlier shares, `density` on average.

    Shares are mapped linearly to a range of 2·`spread` around `density` (Yin et al. 2023,
    arXiv:2310.05175, section 3.2), the average weighted by `sizes`, the blocks' numbers of
    weights. Densities that would leave 0.01 to 1 are cut off and the others make up for it.
    Raises InputError unless 0 < density <= 1, the spread is at least 0 and there are as many
    sizes as shares.
    """
    if not 0 < density <= 1 or spread < 0:
        raise InputError(
            f"expected a density over 0 and at most 1 and a spread of at least 0, "
            f"but they are {density:g} and {spread:g}"
        )
    sizes = [1] * len(shares) if sizes is None else sizes
    if len(sizes) != len(shares) or not shares:
        raise InputError(
            f"expected one size a block, but there are {len(sizes)} for {len(shares)} blocks"
        )
    share_L = torch.tensor(shares, dtype=torch.float64)
    size_L = torch.tensor(sizes, dtype=torch.float64)
    width = float(share_L.max() - share_L.min())
    offset_L = share_L * (2 * spread / width if width else 0.0)
    return _centred(offset_L, size_L / size_L.sum(), density).tolist()


def _centred(offset_L: Tensor, part_L: Tensor, density: float) -> Tensor:
    """`offset_L` plus the constant, found by bisection, that gives the clipped mean `density`."""
    least = min(LEAST_DENSITY, density)
    low, high = float(-offset_L.max()), float(1 - offset_L.min())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        mean = float(((offset_L + middle).clamp(least, 1) * part_L).sum())
        low, high = (middle, high) if mean < density else (low, middle)
    return (offset_L + high).clamp(least, 1)
