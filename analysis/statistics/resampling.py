"""Statistics of domain and expert with whole documents as the unit: nulls, biases, intervals.

Tokens of one document are alike, so they are no independent draws: with routes that cluster by
document and no effect of domain, a chi-square over tokens rejects nearly always. Everything here
weighs, relabels or draws whole documents.

M documents, D domains, L routed layers, E experts, P replicates, C cells (L x E), S statistics.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import false_discovery_control

from moiety.analysis.results.measured import LayerMeasure, Measured
from moiety.analysis.statistics.measures import Floats

CELLS_AT_ONCE = 4_000_000
GROUPS = 20
SAME = 1e-9
EXACT_IN_SINGLE = 2**24
TAIL = 0.025

Statistic = Callable[[Floats], Floats]
"""Tables of counts (P, L, D, E) to one value a layer (P, L)."""


@dataclass(frozen=True)
class Documents:
    """Routes of each document by layer and expert, and the documents' domains."""

    counts_LME: NDArray[numpy.integer]
    domain_M: NDArray[numpy.integer]
    domains: int

    def tables(
        self, weight_PDM: Callable[[slice], NDArray[Any]], replicates: int
    ) -> Iterator[Floats]:
        """Tables (P, L, D, E) of weighted documents, a few replicates at a time.

        `weight_PDM` gives the weights of every document in every domain's row, for a slice of the
        replicates; there may be more rows than domains.
        """
        layers, documents, experts = self.counts_LME.shape
        counts_MC = self.counts_LME.transpose(1, 0, 2).reshape(documents, layers * experts)
        exact = int(self.counts_LME.sum()) < EXACT_IN_SINGLE * layers
        counts_MC = counts_MC.astype(numpy.float32 if exact else numpy.float64)
        step = max(1, CELLS_AT_ONCE // (self.domains * max(documents, layers * experts)))
        for start in range(0, replicates, step):
            chosen = weight_PDM(slice(start, start + step)).astype(counts_MC.dtype)
            sums_PDC = (chosen.reshape(-1, documents) @ counts_MC).astype(numpy.float64)
            rows = chosen.shape[1]
            yield sums_PDC.reshape(-1, rows, layers, experts).transpose(0, 2, 1, 3)

    def relabelled(self, label_PM: NDArray[numpy.integer]) -> Iterator[Floats]:
        """Tables with the documents' domains as `label_PM` says."""
        rows = numpy.arange(self.domains)[:, None]
        return self.tables(lambda part: label_PM[part, None] == rows, len(label_PM))

    def weighted(self, weight_PM: Floats) -> Iterator[Floats]:
        """Tables with each document counted as often as `weight_PM` says."""
        own_DM = self.domain_M == numpy.arange(self.domains)[:, None]
        return self.tables(lambda part: own_DM * weight_PM[part, None], len(weight_PM))


@dataclass(frozen=True)
class Draws:
    """How often documents are relabelled and drawn again, and from which seed."""

    permutations: int
    resamples: int
    seed: int

    def labels(self, domain_M: NDArray[numpy.integer]) -> NDArray[numpy.integer]:
        """The domains as they are, then permuted over documents: (1 + permutations, M)."""
        generator = numpy.random.default_rng((self.seed, 0))
        permuted = (generator.permutation(domain_M) for _ in range(self.permutations))
        return numpy.stack([domain_M, *permuted])

    def weights(self, domain_M: NDArray[numpy.integer]) -> Floats:
        """How often each document counts when every domain's are drawn with replacement.

        One fewer is drawn than there are, and each draw counts for n / (n - 1): so the variance of
        a mean has no bias (Rao and Wu 1988).
        """
        generator = numpy.random.default_rng((self.seed, 1))
        weight_PM = numpy.zeros((self.resamples, len(domain_M)))
        for domain in numpy.unique(domain_M):
            own = numpy.flatnonzero(domain_M == domain)
            even = numpy.full(len(own), 1 / len(own))
            drawn = max(len(own) - 1, 1)
            counts = generator.multinomial(drawn, even, self.resamples)
            weight_PM[:, own] = counts * len(own) / drawn
        return weight_PM


def measure(
    documents: Documents, statistics: Mapping[str, Statistic], draws: Draws
) -> dict[str, LayerMeasure]:
    """Every statistic of every layer with its null, its bias and its interval.

    The null permutes domain labels over documents; the bias is that of a jackknife which leaves
    out groups of a domain's documents (stratified, Efron and Stein 1981); the interval is a
    bootstrap over each domain's documents, moved by as much as it is biased itself.
    """
    null = _evaluate(documents.relabelled(draws.labels(documents.domain_M)), statistics)
    deleted, factor_P = _deletions(documents.domain_M, draws.seed)
    less = _evaluate(documents.weighted(deleted), statistics) if len(deleted) else None
    drawn = _evaluate(documents.weighted(draws.weights(documents.domain_M)), statistics)
    found: dict[str, LayerMeasure] = {}
    for name, null_PL in null.items():
        bias_L = numpy.zeros(null_PL.shape[1])
        if less is not None:
            bias_L = (factor_P[:, None] * (less[name] - null_PL[0])).sum(0)
        found[name] = _measure(null_PL, bias_L, drawn[name])
    return found


def _evaluate(tables: Iterator[Floats], statistics: Mapping[str, Statistic]) -> dict[str, Floats]:
    """Values (P, 1 + L) of every statistic, the mean over layers first."""
    parts: dict[str, list[Floats]] = {name: [] for name in statistics}
    for table in tables:
        for name, statistic in statistics.items():
            value_PL = statistic(table)
            parts[name].append(numpy.concatenate([value_PL.mean(1, keepdims=True), value_PL], 1))
    return {name: numpy.concatenate(part) for name, part in parts.items()}


def _deletions(domain_M: NDArray[numpy.integer], seed: int) -> tuple[Floats, Floats]:
    """Weights (P, M) that leave out a group of one domain's documents, and each one's part.

    The sum over P of part times (statistic without the group - statistic) is the bias.
    """
    generator = numpy.random.default_rng((seed, 2))
    weights: list[Floats] = []
    factors: list[float] = []
    for domain in numpy.unique(domain_M):
        own = generator.permutation(numpy.flatnonzero(domain_M == domain))
        groups = min(GROUPS, len(own))
        if groups < 2:
            continue
        for group in range(groups):
            kept_M = numpy.ones(len(domain_M))
            kept_M[own[group::groups]] = 0
            weights.append(kept_M)
            factors.append((groups - 1) / groups)
    return numpy.array(weights), numpy.array(factors)


def _measure(null_PL: Floats, bias_L: Floats, drawn_PL: Floats) -> LayerMeasure:
    corrected_L = null_PL[0] - bias_L
    adjusted = [float(p) for p in false_discovery_control(p_values(null_PL[:, 1:]))]
    spread_QL = numpy.quantile(drawn_PL, [TAIL, 1 - TAIL], axis=0) - drawn_PL.mean(0)
    p_L = p_values(null_PL)
    every = [
        Measured(
            observed=float(null_PL[0, at]),
            corrected=float(corrected_L[at]),
            low=float(corrected_L[at] + spread_QL[0, at]),
            high=float(corrected_L[at] + spread_QL[1, at]),
            mean=float(null_PL[1:, at].mean()),
            quantile_95=float(numpy.quantile(null_PL[1:, at], 0.95)),
            p_value=float(p_L[at]),
            adjusted_p=float(p_L[0]) if at == 0 else adjusted[at - 1],
        )
        for at in range(null_PL.shape[1])
    ]
    return LayerMeasure(overall=every[0], layers=tuple(every[1:]))


def p_values(null_PX: Floats) -> Floats:
    """One-sided p-values; the first value is the observed one, the others are permuted."""
    extreme = (null_PX[1:] >= null_PX[0] - SAME).sum(0)
    return (1 + extreme) / len(null_PX)


def smallest_p(domain_M: NDArray[numpy.integer], permutations: int) -> float:
    """The least p-value that so many permutations of so few documents can give."""
    return max(1 / (1 + permutations), 1 / distinct_labellings(domain_M))


def distinct_labellings(domain_M: NDArray[numpy.integer]) -> float:
    """In how many ways documents can be grouped into domains of these sizes, to about 1e-9.

    Domains of one size may swap names: that changes no information. At most 1e300 is returned.
    """
    sizes = numpy.bincount(domain_M)
    alike = numpy.unique_counts(sizes[sizes > 0]).counts
    swaps = gammaln(sizes + 1).sum() + gammaln(alike + 1).sum()
    return float(numpy.exp(min(gammaln(len(domain_M) + 1) - swaps, numpy.log(1e300))))
