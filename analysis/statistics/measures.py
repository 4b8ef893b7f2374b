"""What routes say about domains: shares, balance and information.

T tokens, L routed layers, A active experts, E experts, D domains.

Routing weights are taken as shares of their token: the active weights are scaled to sum to 1, so
that gates that do not normalise (Qwen, DeepSeek) compare with those that do (Mixtral).
"""

import numpy
from numpy.typing import NDArray

Floats = NDArray[numpy.float64]
Integers = NDArray[numpy.integer]


def weight_share(
    experts_TLA: Integers,
    weights_TLA: NDArray[numpy.floating],
    domain_T: Integers,
    domains: int,
    experts: int,
) -> Floats:
    """Mean routing weight of each expert over the tokens of each domain.

    Gives `share_DLE`; each `[domain, layer]` sums to 1 (0 for a domain without tokens).
    """
    tokens, layers, active = experts_TLA.shape
    cells = domains * experts
    share_LDE = numpy.zeros((layers, domains, experts))
    offset_T = domain_T.astype(numpy.int64) * experts
    for layer in range(layers):
        scaled_TA = token_shares(weights_TLA[:, layer])
        for rank in range(active):
            cell_T = offset_T + experts_TLA[:, layer, rank]
            sums = numpy.bincount(cell_T, weights=scaled_TA[:, rank], minlength=cells)
            share_LDE[layer] += sums.reshape(domains, experts)
    tokens_D = numpy.bincount(domain_T, minlength=domains) if tokens else numpy.zeros(domains)
    return (share_LDE / numpy.maximum(tokens_D, 1)[:, None]).transpose(1, 0, 2)


def token_shares(weights_TA: NDArray[numpy.floating]) -> Floats:
    """Scale the active weights of each token to sum to 1; equal shares where all are 0."""
    total_T = weights_TA.sum(-1, keepdims=True, dtype=numpy.float64)
    equal = 1 / weights_TA.shape[-1]
    return numpy.divide(
        weights_TA, total_T, out=numpy.full(weights_TA.shape, equal), where=total_T > 0
    )


def top_counts(
    experts_TLA: Integers, group_T: Integers, groups: int, experts: int
) -> NDArray[numpy.int64]:
    """How many tokens of each group (a domain or a document) each expert is first for: (L, G, E)."""
    cell_T = group_T.astype(numpy.int64) * experts
    counts = [
        numpy.bincount(cell_T + experts_TLA[:, layer, 0], minlength=groups * experts)
        for layer in range(experts_TLA.shape[1])
    ]
    return numpy.stack(counts).reshape(-1, groups, experts)


def top_share(counts_LDE: NDArray[numpy.integer]) -> Floats:
    """Share of each domain's tokens that each expert is first for: `share_DLE`."""
    totals_LD1 = numpy.maximum(counts_LDE.sum(-1, keepdims=True), 1)
    return (counts_LDE / totals_LD1).transpose(1, 0, 2)


def load(experts_TLA: Integers, experts: int) -> Floats:
    """Share of all routes (every active expert counts once) that went to each expert: (L, E)."""
    counts = [
        numpy.bincount(experts_TLA[:, layer].ravel(), minlength=experts)
        for layer in range(experts_TLA.shape[1])
    ]
    return numpy.stack(counts) / max(experts_TLA.shape[0] * experts_TLA.shape[2], 1)


def max_violation(load_LE: Floats) -> Floats:
    """MaxVio of each layer, (max - mean) / mean of the load: 0 when balanced, E - 1 when collapsed.

    Loss-free balancing, arXiv 2408.15664, section 4.
    """
    mean_L = load_LE.mean(-1)
    return load_LE.max(-1) / numpy.where(mean_L > 0, mean_L, 1) - 1


def entropy(probabilities: Floats) -> Floats:
    """Entropy in nats over the last axis; zero cells contribute nothing."""
    logs = numpy.log(numpy.where(probabilities > 0, probabilities, 1))
    return -(probabilities * logs).sum(-1)


def mutual_information(counts_DE: NDArray[numpy.number]) -> tuple[Floats, Floats]:
    """Information between domain and top-1 expert, and its normalised form.

    Takes counts (..., D, E). Domains weigh equally, however many tokens each has. Gives
    I(E;D) = H(E) - H(E|D) in nats, and NMI = I / sqrt(H(E) H(D)), which is 1 when expert and
    domain name each other and 0 when they are independent, only one expert is used, or there is
    only one domain. Both are biased upwards in small samples: compare with `permutation_test`.
    """
    totals = numpy.maximum(counts_DE.sum(-1, keepdims=True), 1)
    given_DE = counts_DE / totals
    domains = counts_DE.shape[-2]
    experts_entropy = entropy(given_DE.mean(-2))
    information = numpy.maximum(experts_entropy - entropy(given_DE).mean(-1), 0)
    scale = numpy.sqrt(experts_entropy * numpy.log(domains))
    tiny = scale < 1e-12
    return information, numpy.where(tiny, 0, information / numpy.where(tiny, 1, scale))


def mean_by_domain(values_T: NDArray[numpy.floating], domain_T: Integers, domains: int) -> Floats:
    """Mean of each domain's values, NaN left out; NaN for a domain that has none: (D,)."""
    known_T = numpy.isfinite(values_T)
    sums_D = numpy.bincount(domain_T[known_T], weights=values_T[known_T], minlength=domains)
    counts_D = numpy.bincount(domain_T[known_T], minlength=domains)
    return numpy.where(counts_D > 0, sums_D / numpy.maximum(counts_D, 1), numpy.nan)
