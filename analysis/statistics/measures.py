"""What routes say about domains: shares, balance and information.

T tokens, L routed layers, A active experts, E experts, D domains.

Routing weights are taken as shares of their token: the active weights are scaled to sum to 1, so
that gates that do not normalise (Qwen, DeepSeek) compare with those that do (Mixtral).
"""

import numpy
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

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
        scaled_AT = _token_shares(numpy.ascontiguousarray(weights_TLA[:, layer].T))
        for rank in range(active):
            cell_T = offset_T + experts_TLA[:, layer, rank]
            sums = numpy.bincount(cell_T, weights=scaled_AT[rank], minlength=cells)
            share_LDE[layer] += sums.reshape(domains, experts)
    tokens_D = numpy.bincount(domain_T, minlength=domains) if tokens else numpy.zeros(domains)
    return (share_LDE / numpy.maximum(tokens_D, 1)[:, None]).transpose(1, 0, 2)


def token_shares(weights_TA: NDArray[numpy.floating]) -> Floats:
    """Scale the active weights of each token to sum to 1; equal shares where all are 0."""
    return _token_shares(weights_TA.T).T


def _token_shares(weights_AT: NDArray[numpy.floating]) -> Floats:
    total_T = weights_AT.sum(0, dtype=numpy.float64)
    none_T = total_T <= 0
    shares_AT = weights_AT / numpy.where(none_T, 1, total_T)
    if none_T.any():
        shares_AT[:, none_T] = 1 / len(weights_AT)
    return shares_AT


def top_counts(
    experts_TLA: Integers, group_T: Integers, groups: int, experts: int
) -> NDArray[numpy.int64]:
    """How many tokens of each group (a domain or a document) each expert is first for: (L, G, E)."""
    return route_counts(experts_TLA[..., :1], group_T, groups, experts)


def route_counts(
    experts_TLA: Integers, group_T: Integers, groups: int, experts: int
) -> NDArray[numpy.int64]:
    """How many routes of each group (a domain or a document) go to each expert: (L, G, E)."""
    layers, active = experts_TLA.shape[1:]
    cell_T = group_T.astype(numpy.int64) * experts
    counts = numpy.zeros((layers, groups * experts), numpy.int64)
    for layer in range(layers):
        for rank in range(active):
            cells_T = cell_T + experts_TLA[:, layer, rank]
            counts[layer] += numpy.bincount(cells_T, minlength=groups * experts)
    return counts.reshape(layers, groups, experts)


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


def cramers_v_squared(counts_DE: NDArray[numpy.number]) -> Floats:
    """Cramer's V, squared, of domain and expert, domains weighing equally: (..., D, E) to (...).

    Chi-square over the number of tokens over min(D, experts used) - 1: 1 when one names the other.
    Biased upwards in small samples, as information is.
    """
    totals = numpy.maximum(counts_DE.sum(-1, keepdims=True), 1)
    given_DE = counts_DE / totals
    mean_E = given_DE.mean(-2, keepdims=True)
    used = mean_E > 0
    square = ((given_DE - mean_E) ** 2 / numpy.where(used, mean_E, 1)).sum((-1, -2))
    smaller = numpy.minimum(counts_DE.shape[-2], used[..., 0, :].sum(-1)) - 1
    return square / counts_DE.shape[-2] / numpy.maximum(smaller, 1)


def matched(counts_DE: NDArray[numpy.number]) -> NDArray[numpy.int64]:
    """The expert of each domain in the best one-to-one matching, -1 where none is left: (..., D).

    Hungarian method on P(expert | domain).
    """
    flat = _given(counts_DE).reshape(-1, *counts_DE.shape[-2:])
    matched_D = numpy.full(flat.shape[:2], -1)
    for row, share_DE in enumerate(flat):
        domains, experts = linear_sum_assignment(share_DE, maximize=True)
        matched_D[row, domains] = experts
    return matched_D.reshape(*counts_DE.shape[:-1])


def matched_share(counts_DE: NDArray[numpy.number]) -> Floats:
    """Mean over domains of the share that goes to the matched expert: (..., D, E) to (...)."""
    given_DE, matched_D = _given(counts_DE), matched(counts_DE)
    share_D = numpy.take_along_axis(given_DE, numpy.maximum(matched_D, 0)[..., None], -1)[..., 0]
    return numpy.where(matched_D >= 0, share_D, 0).mean(-1)


def _given(counts_DE: NDArray[numpy.number]) -> Floats:
    return counts_DE / numpy.maximum(counts_DE.sum(-1, keepdims=True), 1)


def table_information(counts_XY: NDArray[numpy.number]) -> Floats:
    """Normalised mutual information I / sqrt(H(X) H(Y)) of tables of counts (..., X, Y) to (...).

    Every count weighs the same, unlike in `mutual_information`; 0 where one side never varies.
    """
    total = numpy.maximum(counts_XY.sum((-1, -2), keepdims=True), 1)
    joint_XY = counts_XY / total
    rows, columns = entropy(joint_XY.sum(-1)), entropy(joint_XY.sum(-2))
    information = rows + columns - entropy(joint_XY.reshape(*joint_XY.shape[:-2], -1))
    scale = numpy.sqrt(rows * columns)
    tiny = scale < 1e-12
    return numpy.where(tiny, 0, numpy.maximum(information, 0) / numpy.where(tiny, 1, scale))


def mean_by_domain(values_T: NDArray[numpy.floating], domain_T: Integers, domains: int) -> Floats:
    """Mean of each domain's values, NaN left out; NaN for a domain that has none: (D,)."""
    known_T = numpy.isfinite(values_T)
    if not known_T.all():
        values_T, domain_T = values_T[known_T], domain_T[known_T]
    sums_D = numpy.bincount(domain_T, weights=values_T, minlength=domains)
    counts_D = numpy.bincount(domain_T, minlength=domains)
    return numpy.where(counts_D > 0, sums_D / numpy.maximum(counts_D, 1), numpy.nan)
