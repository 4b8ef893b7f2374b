"""Is routing tied to domains by more than chance? A permutation test over documents.

Tokens of one document are alike, so they are not independent draws: with routes that cluster by
document and no effect of domain, a chi-square over tokens rejects nearly always. Permuting the
domain labels over whole documents keeps the level.

M documents, D domains, L routed layers, E experts, P permutations.
"""

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import false_discovery_control

from moiety.analysis.statistics.measures import mutual_information
from moiety.errors import InputError

CELLS_AT_ONCE = 4_000_000
SAME = 1e-9


@dataclass(frozen=True, kw_only=True)
class Null:
    """What relabelled documents give for one statistic.

    `mean` and `quantile_95` describe the permuted statistic; `p_value` is (1 + permutations at
    least as large as observed) / (1 + permutations).
    """

    observed: float
    mean: float
    quantile_95: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """Normalised mutual information of domain and top-1 expert against its null.

    `overall` is the mean over layers, `layers` each layer by itself, `adjusted_L` the layers'
    p-values after Benjamini and Hochberg. `smallest_p` is the least p-value that so many
    permutations of so few documents could give.
    """

    overall: Null
    layers: tuple[Null, ...]
    adjusted_L: tuple[float, ...]
    permutations: int
    smallest_p: float


def permutation_test(
    counts_LME: NDArray[numpy.integer],
    domain_M: NDArray[numpy.integer],
    domains: int,
    *,
    permutations: int = 200,
    seed: int = 0,
) -> PermutationTest:
    """Permute the domain labels over documents.

    `counts_LME` are the tokens of each document that each expert is first for, `domain_M` the
    documents' domains. Raises InputError when `permutations` is not positive.
    """
    if permutations < 1:
        raise InputError(f"permutations must be at least 1, but it is {permutations}")
    generator = numpy.random.default_rng(seed)
    labels_PM = numpy.stack(
        [domain_M, *(generator.permutation(domain_M) for _ in range(permutations))]
    )
    nmi_PL = _information(counts_LME, labels_PM, domains)
    layers = tuple(_null(column_P) for column_P in nmi_PL.T)
    return PermutationTest(
        overall=_null(nmi_PL.mean(1)),
        layers=layers,
        adjusted_L=tuple(false_discovery_control([null.p_value for null in layers]).tolist()),
        permutations=permutations,
        smallest_p=max(1 / (1 + permutations), 1 / distinct_labellings(domain_M)),
    )


def distinct_labellings(domain_M: NDArray[numpy.integer]) -> float:
    """In how many ways documents can be grouped into domains of these sizes, to about 1e-9.

    Domains of one size may swap names: that changes no information. At most 1e300 is returned.
    """
    sizes = numpy.bincount(domain_M)
    alike = numpy.unique_counts(sizes[sizes > 0]).counts
    swaps = gammaln(sizes + 1).sum() + gammaln(alike + 1).sum()
    return float(numpy.exp(min(gammaln(len(domain_M) + 1) - swaps, numpy.log(1e300))))


def _information(
    counts_LME: NDArray[numpy.integer], labels_PM: NDArray[numpy.integer], domains: int
) -> NDArray[numpy.float64]:
    layers, documents, experts = counts_LME.shape
    counts_MC = counts_LME.transpose(1, 0, 2).reshape(documents, layers * experts).astype(float)
    step = max(1, CELLS_AT_ONCE // (domains * max(documents, layers * experts)))
    results = []
    for start in range(0, len(labels_PM), step):
        chosen_PDM = labels_PM[start : start + step, None] == numpy.arange(domains)[:, None]
        sums_PDC = chosen_PDM.astype(float) @ counts_MC
        sums_PDLE = sums_PDC.reshape(-1, domains, layers, experts)
        results.append(mutual_information(sums_PDLE.transpose(0, 2, 1, 3))[1])
    return numpy.concatenate(results)


def _null(values_P: NDArray[numpy.float64]) -> Null:
    """The first value is the observed one, the others are permuted."""
    observed, permuted = values_P[0], values_P[1:]
    extreme = int((permuted >= observed - SAME).sum())
    return Null(
        observed=float(observed),
        mean=float(permuted.mean()),
        quantile_95=float(numpy.quantile(permuted, 0.95)),
        p_value=(1 + extreme) / (1 + len(permuted)),
    )
