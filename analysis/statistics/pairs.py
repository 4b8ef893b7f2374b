"""Experts chosen together, and from one layer to the next.

T tokens, L routed layers, A active experts, E experts.
"""

import itertools

import numpy
from numpy.typing import NDArray

from moiety.analysis.results.parts import Coactivation, Flow
from moiety.analysis.statistics.measures import Floats, table_information

Routes = NDArray[numpy.integer]
PAIRINGS = 3


def coactivation(experts_LAT: Routes, experts: int) -> Coactivation | None:
    """Lift of all pairs of a token's routes; None where there is nothing to choose."""
    active, tokens = experts_LAT.shape[1:]
    if active in (1, experts):
        return None
    layers = [_pairs(experts_AT, experts) for experts_AT in experts_LAT]
    pairs_LEE = numpy.stack(layers).astype(float)
    chosen_LE = numpy.stack(
        [numpy.bincount(experts_AT.ravel(), minlength=experts) for experts_AT in experts_LAT]
    ).astype(float)
    expected_LEE = chosen_LE[:, :, None] * chosen_LE[:, None, :]
    expected_LEE[:, numpy.arange(experts), numpy.arange(experts)] = 0
    lift_LEE = numpy.divide(
        pairs_LEE * tokens,
        expected_LEE,
        out=numpy.full(pairs_LEE.shape, numpy.nan),
        where=expected_LEE > 0,
    )
    return Coactivation(lift_LEE=lift_LEE, chance=(active - 1) * experts / (active * (experts - 1)))


def _pairs(experts_AT: Routes, experts: int) -> NDArray[numpy.int64]:
    wide_AT = experts_AT.astype(numpy.int64)
    counts = numpy.zeros(experts * experts, numpy.int64)
    for one, other in itertools.combinations(wide_AT, 2):
        counts += numpy.bincount(one * experts + other, minlength=experts * experts)
    counts_EE = counts.reshape(experts, experts)
    return counts_EE + counts_EE.T


def flow(first_LT: Routes, document_T: Routes, experts: int, seed: int) -> Flow | None:
    """Tokens from each expert of a layer to each of the next; None with one layer."""
    if len(first_LT) < 2:
        return None
    tables_LEE = [_table(a, b, experts) for a, b in itertools.pairwise(first_LT)]
    chance_RL = [
        [table_information(_table(a, b[order], experts)) for a, b in itertools.pairwise(first_LT)]
        for order in _within_documents(document_T, seed)
    ]
    return Flow(
        share_LEE=numpy.stack(tables_LEE) / max(first_LT.shape[1], 1),
        nmi_L=table_information(numpy.stack(tables_LEE)),
        chance_L=numpy.array(chance_RL).mean(0),
    )


def _table(one_T: Routes, other_T: Routes, experts: int) -> Floats:
    cells_T = one_T.astype(numpy.int64) * experts + other_T
    return numpy.bincount(cells_T, minlength=experts**2).reshape(experts, experts).astype(float)


def _within_documents(document_T: Routes, seed: int) -> list[NDArray[numpy.intp]]:
    """Orders of the tokens that put another token of the same document in each one's place."""
    generator = numpy.random.default_rng((seed, 4))
    places = numpy.argsort(document_T, kind="stable")
    orders = []
    for _ in range(PAIRINGS):
        shuffled = numpy.lexsort((generator.random(len(document_T)), document_T))
        order = numpy.empty_like(places)
        order[places] = shuffled
        orders.append(order)
    return orders
