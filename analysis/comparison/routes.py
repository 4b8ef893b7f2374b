"""Routes of the same tokens in two traces.

T tokens, L routed layers, A and B active experts, E and F experts, D domains, M documents.
"""

from typing import Any

import numpy
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import jensenshannon

from moiety.analysis.losses import LossDocuments
from moiety.analysis.results.comparison import Comparison
from moiety.analysis.statistics.measures import (
    Floats,
    entropy,
    mean_by_domain,
    route_counts,
    token_shares,
)
from moiety.analysis.trace.file import Trace
from moiety.errors import InputError

SHUFFLES = 3
TOKENS_AT_ONCE = 65_536


def compare(first: Trace, second: Trace, *, resamples: int = 999, seed: int = 0) -> Comparison:
    """Hold two traces of the same text against each other, see `Comparison`.

    Raises InputError when they are not of the same tokens or have other numbers of layers.
    """
    first, second = _aligned(first, second)
    domains = len(first.header.domains)
    same_experts = len(first.header.experts) == len(second.header.experts)
    layers = range(len(first.header.layers))
    by_token = [_by_token(first, second, layer, same_experts) for layer in layers]
    means = {
        name: numpy.stack(
            [mean_by_domain(one[name], first.domain_T, domains) for one in by_token], 1
        )
        for name in by_token[0]
    }
    agreements = [_agreement(first, second, layer, seed) for layer in layers]
    chance_DL, drift_DL = _by_domain(first, second, same_experts)
    overlap_T = numpy.mean([one["overlap"] for one in by_token], 0)
    return Comparison(
        first=first.header.model,
        second=second.header.model,
        domains=first.header.domains,
        layers=first.header.layers,
        first_experts=first.header.experts,
        second_experts=second.header.experts,
        tokens=len(first),
        seed=seed,
        overlap=_intervals(first, overlap_T, resamples, seed),
        overlap_DL=means["overlap"],
        jaccard_DL=means["jaccard"],
        top_DL=means["top"],
        chance_DL=chance_DL,
        drift_DL=drift_DL,
        weight_DL=means["weight"],
        agreement_L=numpy.array([agreement for agreement, _ in agreements]),
        matched_LE=numpy.stack([matched_E for _, matched_E in agreements]),
        loss_change=_intervals(first, second.loss_T - first.loss_T, resamples, seed),
    )


def _aligned(first: Trace, second: Trace) -> tuple[Trace, Trace]:
    """Both in the order of the text."""
    if len(first.header.layers) != len(second.header.layers):
        raise InputError(
            f"expected traces of equally many layers, but they have {len(first.header.layers)} "
            f"and {len(second.header.layers)}"
        )
    if first.header.domains != second.header.domains or len(first) != len(second):
        raise _other_text(first, second)
    first, second = _sorted(first), _sorted(second)
    for name in ("domain_T", "document_T", "window_T", "position_T", "token_id_T"):
        if not numpy.array_equal(getattr(first, name), getattr(second, name)):
            raise _other_text(first, second)
    return first, second


def _other_text(first: Trace, second: Trace) -> InputError:
    return InputError(
        "expected two traces of the same text, cut alike by one tokenizer, but one has "
        f"{first.header.tokens} tokens and the other {second.header.tokens}, or other ones; trace "
        "both with the same --data, --windows and --context-length"
    )


def _sorted(trace: Trace) -> Trace:
    keys = (trace.position_T, trace.window_T, trace.document_T, trace.domain_T)
    order = numpy.lexsort(keys)
    if numpy.array_equal(order, numpy.arange(len(order))):
        return trace
    return trace.rows(order)


def _by_token(first: Trace, second: Trace, layer: int, same_experts: bool) -> dict[str, Floats]:
    """Overlap, Jaccard index, same first expert and distance of weights of every token."""
    one_TA, other_TB = first.experts_TLA[:, layer], second.experts_TLA[:, layer]
    if not same_experts:
        return {
            name: numpy.full(len(first), numpy.nan)
            for name in ("overlap", "jaccard", "top", "weight")
        }
    shared_T = numpy.zeros(len(first))
    for rank in range(one_TA.shape[1]):
        shared_T += (one_TA[:, rank, None] == other_TB).any(1)
    every = one_TA.shape[1] + other_TB.shape[1]
    return {
        "overlap": shared_T / one_TA.shape[1],
        "jaccard": shared_T / (every - shared_T),
        "top": (one_TA[:, 0] == other_TB[:, 0]).astype(float),
        "weight": _distance(first, second, layer),
    }


def _distance(first: Trace, second: Trace, layer: int) -> Floats:
    """L1 distance of the two distributions of weight over experts, of every token."""
    experts = len(first.header.experts)
    parts = []
    for start in range(0, len(first), TOKENS_AT_ONCE):
        rows = slice(start, start + TOKENS_AT_ONCE)
        dense = [
            _dense(trace.experts_TLA[rows, layer], trace.weights_TLA[rows, layer], experts)
            for trace in (first, second)
        ]
        parts.append(numpy.abs(dense[0] - dense[1]).sum(1))
    return numpy.concatenate(parts)


def _dense(experts_TA: NDArray[Any], weights_TA: NDArray[Any], experts: int) -> Floats:
    dense_TE = numpy.zeros((len(experts_TA), experts))
    numpy.put_along_axis(dense_TE, experts_TA.astype(numpy.intp), token_shares(weights_TA), 1)
    return dense_TE


def _by_domain(first: Trace, second: Trace, same_experts: bool) -> tuple[Floats, Floats]:
    """Overlap of randomly paired tokens, and drift of the distribution over experts: (D, L)."""
    shape = (len(first.header.domains), len(first.header.layers))
    if not same_experts:
        return numpy.full(shape, numpy.nan), numpy.full(shape, numpy.nan)
    domains, experts = shape[0], len(first.header.experts)
    share, other = (
        route_counts(trace.experts_TLA, trace.domain_T, domains, experts)
        / numpy.bincount(trace.domain_T, minlength=domains)[:, None]
        for trace in (first, second)
    )
    chance_LD = (share * other).sum(-1) / first.header.active
    drift_LD = numpy.asarray(
        jensenshannon(share, other, base=2, axis=-1)  # pyright: ignore[reportCallIssue]
    )
    return chance_LD.T, drift_LD.T


def _agreement(
    first: Trace, second: Trace, layer: int, seed: int
) -> tuple[float, NDArray[numpy.int64]]:
    """Adjusted mutual information of first experts, and the matching of their numbers."""
    one_T, other_T = first.experts_TLA[:, layer, 0], second.experts_TLA[:, layer, 0]
    sizes = len(first.header.experts), len(second.header.experts)
    generator = numpy.random.default_rng((seed, 11))
    table_EF = _table(one_T, other_T, *sizes)
    chance = numpy.mean(
        [
            _information(_table(one_T, generator.permutation(other_T), *sizes))
            for _ in range(SHUFFLES)
        ]
    )
    share = table_EF / max(table_EF.sum(), 1)
    most = (entropy(share.sum(1)) + entropy(share.sum(0))) / 2
    scale = float(most - chance)
    agreement = (_information(table_EF) - chance) / scale if scale > 1e-12 else 1.0
    matched_E = numpy.full(sizes[0], -1)
    rows, columns = linear_sum_assignment(table_EF, maximize=True)
    matched_E[rows] = columns
    return float(agreement), matched_E


def _table(one_T: NDArray[Any], other_T: NDArray[Any], rows: int, columns: int) -> Floats:
    cells = one_T.astype(numpy.int64) * columns + other_T
    return numpy.bincount(cells, minlength=rows * columns).reshape(rows, columns).astype(float)


def _information(table: Floats) -> float:
    share = table / max(table.sum(), 1)
    return float(entropy(share.sum(1)) + entropy(share.sum(0)) - entropy(share.ravel()))


def _intervals(trace: Trace, value_T: NDArray[Any], resamples: int, seed: int) -> dict[str, Any]:
    """Means by domain with intervals over documents; values that are NaN are left out."""
    _, first_M, document_T = numpy.unique(trace.document_T, return_index=True, return_inverse=True)
    known_T = numpy.isfinite(value_T)
    tokens_M = numpy.bincount(document_T[known_T], minlength=len(first_M))
    documents = LossDocuments(
        trace.header.domains, trace.domain_T[first_M], tokens_M, resamples, seed=seed
    )
    sums_M = numpy.bincount(
        document_T[known_T], weights=value_T[known_T].astype(float), minlength=len(first_M)
    )
    return documents.by_domain(sums_M.astype(numpy.float64))
