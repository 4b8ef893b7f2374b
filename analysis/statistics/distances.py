"""How far apart domains are routed, and how far two halves of one domain are.

M documents, D domains, L routed layers, E experts, P splits.
"""

import numpy
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon

from moiety.analysis.results.parts import Distances
from moiety.analysis.statistics.measures import Floats
from moiety.analysis.statistics.resampling import Documents

SPLITS = 50


def distances(documents: Documents, seed: int, splits: int = SPLITS) -> Distances:
    """Jensen-Shannon distances between domains and their noise floor, see `Distances`."""
    [whole_LDE] = next(documents.relabelled(documents.domain_M[None]))
    halves_PHM = _halves(documents.domain_M, documents.domains, seed, splits)
    parts = documents.tables(lambda part: halves_PHM[part], splits)
    halves_PLHE = numpy.concatenate(list(parts))
    first, second = numpy.split(halves_PLHE, 2, axis=2)
    every_PLDD = _between(first, second)
    mean_LDD = every_PLDD.mean(0)
    within_PLD = numpy.diagonal(every_PLDD, axis1=2, axis2=3)
    return Distances(
        whole_LDD=_between(whole_LDE, whole_LDE),
        halves_LDD=(mean_LDD + mean_LDD.transpose(0, 2, 1)) / 2,
        floor_LD=numpy.quantile(within_PLD, 0.95, axis=0),
        splits=splits,
    )


def _halves(
    domain_M: NDArray[numpy.integer], domains: int, seed: int, splits: int
) -> NDArray[numpy.bool_]:
    """Random halves of every domain: (splits, 2 D, M), all first halves before the second ones."""
    generator = numpy.random.default_rng((seed, 3))
    halves = numpy.zeros((splits, 2 * domains, len(domain_M)), numpy.bool_)
    for split in range(splits):
        for domain in range(domains):
            own = generator.permutation(numpy.flatnonzero(domain_M == domain))
            halves[split, domain, own[: len(own) // 2]] = True
            halves[split, domains + domain, own[len(own) // 2 :]] = True
    return halves


def _between(first: Floats, second: Floats) -> Floats:
    """Distances (..., D, D) of every row of one to every row of the other; NaN for empty rows."""
    one, other = _shares(first)[..., :, None, :], _shares(second)[..., None, :, :]
    with numpy.errstate(invalid="ignore"):
        distance = jensenshannon(one, other, base=2, axis=-1)  # pyright: ignore[reportCallIssue]
    return numpy.asarray(distance)


def _shares(counts: Floats) -> Floats:
    total = counts.sum(-1, keepdims=True)
    return numpy.divide(counts, total, out=numpy.full(counts.shape, numpy.nan), where=total > 0)
