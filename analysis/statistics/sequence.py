"""Routes along a text: repetition from token to token, and where in a window.

T tokens, L routed layers, E experts, D domains, M documents, B bins of position.
"""

import numpy
from numpy.typing import NDArray

from moiety.analysis.results.parts import Positions, Repetition
from moiety.analysis.statistics.measures import Floats, mean_by_domain, table_information
from moiety.analysis.statistics.resampling import Documents
from moiety.analysis.trace.file import Trace

Codes = NDArray[numpy.integer]
ROTATIONS = 3


def reading_order(trace: Trace) -> tuple[NDArray[numpy.intp], NDArray[numpy.intp]]:
    """The rows in the order of the text, and where its windows start in that order."""
    order = numpy.lexsort((trace.position_T, trace.window_T, trace.document_T))
    keys = numpy.stack([trace.document_T[order], trace.window_T[order]])
    change = (keys[:, 1:] != keys[:, :-1]).any(0)
    return order, numpy.concatenate([[0], numpy.flatnonzero(change) + 1])


def repetition(
    first_LT: Codes, trace: Trace, order_T: Codes, start_W: Codes, documents: Documents
) -> Repetition:
    """How often consecutive tokens go first to the same expert, see `Repetition`."""
    follows_T = numpy.diff(trace.position_T[order_T]) == 1
    follows_T[start_W[1:] - 1] = False
    later = order_T[1:][follows_T]
    earlier = order_T[:-1][follows_T]
    domain_T, domains = trace.domain_T[later], documents.domains
    same = [
        mean_by_domain((first_T[later] == first_T[earlier]).astype(float), domain_T, domains)
        for first_T in first_LT
    ]
    domain_LD, document_LD = _by_chance(documents)
    return Repetition(
        observed_DL=numpy.stack(same, 1), domain_DL=domain_LD.T, document_DL=document_LD.T
    )


def _by_chance(documents: Documents) -> tuple[Floats, Floats]:
    """Chance that two tokens of a domain, and of a document, have one expert: (L, D) each."""
    counts_LME = documents.counts_LME.astype(float)
    tokens_LM = counts_LME.sum(-1)
    alike_LM = (counts_LME * (counts_LME - 1)).sum(-1)
    pairs_LM = numpy.maximum(tokens_LM * (tokens_LM - 1), 1)
    layers, domains = len(counts_LME), documents.domains
    domain_LD, document_LD = numpy.full((2, layers, domains), numpy.nan)
    for domain in range(domains):
        own = documents.domain_M == domain
        total_LE = counts_LME[:, own].sum(1)
        share_LE = total_LE / numpy.maximum(total_LE.sum(-1, keepdims=True), 1)
        domain_LD[:, domain] = (share_LE**2).sum(-1)
        weight_LM = tokens_LM[:, own] / numpy.maximum(tokens_LM[:, own].sum(1, keepdims=True), 1)
        document_LD[:, domain] = (weight_LM * alike_LM[:, own] / pairs_LM[:, own]).sum(1)
    return domain_LD, document_LD


def positions(
    first_LT: Codes,
    trace: Trace,
    order_T: Codes,
    start_W: Codes,
    own_T: Codes,
    seed: int,
) -> Positions:
    """Routes by position in the window; `own_T` is each token's own expert, -1 without one."""
    first_B = _bins(int(trace.position_T.max()) + 1)
    bin_T = numpy.searchsorted(first_B, trace.position_T, side="right") - 1
    bins, experts = len(first_B), len(trace.header.experts)
    owned_T = own_T >= 0
    own_BL = [
        mean_by_domain((first_T[owned_T] == own_T[owned_T]).astype(float), bin_T[owned_T], bins)
        for first_T in first_LT
    ]
    entropy_BL = [mean_by_domain(column_T, bin_T, bins) for column_T in trace.entropy_TL.T]
    rotations = [_rotated(order_T, start_W, seed, turn) for turn in range(ROTATIONS)]
    chance_RL = [
        [_nmi(bin_T[order_T], first_T[rotated_T], bins, experts) for first_T in first_LT]
        for rotated_T in rotations
    ]
    return Positions(
        first_B=first_B,
        tokens_B=numpy.bincount(bin_T, minlength=bins),
        entropy_BL=numpy.stack(entropy_BL, 1),
        loss_B=mean_by_domain(trace.loss_T, bin_T, bins),
        own_share_BL=numpy.stack(own_BL, 1),
        nmi_L=numpy.array([_nmi(bin_T, first_T, bins, experts) for first_T in first_LT]),
        chance_L=numpy.array(chance_RL).mean(0),
    )


def _bins(length: int) -> NDArray[numpy.int64]:
    """0, 1, 2, 4, 8, ... below `length`."""
    powers = 2 ** numpy.arange(max(length - 1, 1).bit_length())
    return numpy.concatenate([[0], powers[powers < length]])


def _rotated(order_T: Codes, start_W: Codes, seed: int, turn: int) -> Codes:
    """The rows in reading order, every window's turned by a random number of tokens."""
    generator = numpy.random.default_rng((seed, 7, turn))
    length_W = numpy.diff(numpy.append(start_W, len(order_T)))
    shift_W = generator.integers(0, length_W)
    window_T = numpy.repeat(numpy.arange(len(start_W)), length_W)
    offset_T = numpy.arange(len(order_T)) - start_W[window_T] + shift_W[window_T]
    return order_T[start_W[window_T] + offset_T % length_W[window_T]]


def _nmi(bin_T: Codes, first_T: Codes, bins: int, experts: int) -> float:
    counts = numpy.bincount(bin_T * experts + first_T, minlength=bins * experts)
    return float(table_information(counts.reshape(bins, experts).astype(float)))
