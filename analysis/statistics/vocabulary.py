"""How much of routing is the token's identity: syntax is not to be sold as domain.

T tokens, V token types, L routed layers, E experts, D domains, M documents, P permutations.
"""

import numpy
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from moiety.analysis.results.measured import LayerMeasure, Measured
from moiety.analysis.results.parts import Vocabulary
from moiety.analysis.statistics.measures import Floats
from moiety.analysis.statistics.resampling import Documents, Draws, p_values

Codes = NDArray[numpy.integer]
SHUFFLES = 2
MOST_TOKENS = 250_000
MOST_PERMUTATIONS = 49
LEAST_INFORMATION = 1e-6


def vocabulary(
    first_LT: Codes,
    token_T: Codes,
    document_T: Codes,
    documents: Documents,
    information: LayerMeasure,
    draws: Draws,
) -> Vocabulary:
    """Vocabulary specialisation over its shuffled null, and I(expert; domain | token).

    `token_T` are token ids, `document_T` rows of `documents`, `information` that of expert and
    domain alone. The conditional information is that of at most MOST_TOKENS tokens, whole
    documents of every domain, and of types that occur in several documents.
    """
    experts = documents.counts_LME.shape[2]
    _, type_T = numpy.unique(token_T, return_inverse=True)
    types = int(type_T.max()) + 1
    generator = numpy.random.default_rng((draws.seed, 5))
    shuffled_RL = [
        [
            _specialisation(generator.permutation(first_T), type_T, types, experts)
            for first_T in first_LT
        ]
        for _ in range(SHUFFLES)
    ]
    conditional_LP, shared = _conditional(first_LT, type_T, document_T, documents, draws)
    overall = _against_null(conditional_LP.mean(0)[None])[0]
    known = information.overall.corrected
    explained = 1 - overall.corrected / known if known > LEAST_INFORMATION else numpy.nan
    return Vocabulary(
        specialisation_L=numpy.array(
            [_specialisation(first_T, type_T, types, experts) for first_T in first_LT]
        ),
        shuffled_L=numpy.array(shuffled_RL).mean(0),
        conditional=overall,
        conditional_L=_against_null(conditional_LP),
        explained=explained,
        types=types,
        shared=shared,
    )


def _specialisation(first_T: Codes, type_T: Codes, types: int, experts: int) -> float:
    table_VE = numpy.bincount(type_T * experts + first_T, minlength=types * experts)
    table_VE = table_VE.reshape(types, experts)
    return float((table_VE.max(1) / table_VE.sum(1)).mean())


def _conditional(
    first_LT: Codes, type_T: Codes, document_T: Codes, documents: Documents, draws: Draws
) -> tuple[Floats, int]:
    """I(expert; domain | type) of every layer: observed, then permuted (L, 1 + P)."""
    kept_M = _sampled(document_T, documents, draws.seed)
    rows_T = numpy.flatnonzero(kept_M[document_T])
    rows_T, shared = _in_several(rows_T, type_T, document_T)
    if not len(rows_T):
        return numpy.zeros((len(first_LT), 2)), 0
    _, type_T = numpy.unique(type_T[rows_T], return_inverse=True)
    document_T = document_T[rows_T]
    permutations = min(draws.permutations, MOST_PERMUTATIONS)
    label_PM = Draws(permutations, 0, draws.seed).labels(documents.domain_M)
    first_LT = first_LT[:, rows_T]
    columns = [
        _information(first_LT, type_T, label_M[document_T], documents) for label_M in label_PM
    ]
    return numpy.stack(columns, 1), shared


def _sampled(document_T: Codes, documents: Documents, seed: int) -> NDArray[numpy.bool_]:
    """Whole documents, all domains alike, of at most about MOST_TOKENS tokens."""
    tokens_M = numpy.bincount(document_T, minlength=len(documents.domain_M))
    share = min(1.0, MOST_TOKENS / max(int(tokens_M.sum()), 1))
    generator = numpy.random.default_rng((seed, 6))
    kept_M = numpy.zeros(len(tokens_M), numpy.bool_)
    for domain in range(documents.domains):
        own = generator.permutation(numpy.flatnonzero(documents.domain_M == domain))
        kept_M[own[: max(1, round(share * len(own)))]] = True
    return kept_M


def _in_several(rows_T: Codes, type_T: Codes, document_T: Codes) -> tuple[Codes, int]:
    """The rows whose token type occurs in more than one document: others tell nothing here."""
    documents = int(document_T.max()) + 1
    pairs = numpy.unique(type_T[rows_T].astype(numpy.int64) * documents + document_T[rows_T])
    several_V = numpy.bincount(pairs // documents, minlength=int(type_T.max()) + 1) > 1
    return rows_T[several_V[type_T[rows_T]]], int(several_V.sum())


def _information(first_LT: Codes, type_T: Codes, domain_T: Codes, documents: Documents) -> Floats:
    """Nats of I(E; D | V) = H(V, D) + H(V, E) - H(V) - H(V, D, E), domains weighing equally."""
    domains, experts = documents.domains, documents.counts_LME.shape[2]
    tokens_D = numpy.bincount(domain_T, minlength=domains)
    present = int((tokens_D > 0).sum())
    weight_T = (1 / (present * numpy.maximum(tokens_D, 1)))[domain_T]
    types = int(type_T.max()) + 1
    both_T = (type_T * domains + domain_T) * experts
    both_VD = numpy.bincount(both_T // experts, weights=weight_T, minlength=types * domains)
    known = _entropy(both_VD) - _entropy(both_VD.reshape(types, domains).sum(1))
    found = []
    for first_T in first_LT:
        all_VDE = numpy.bincount(
            both_T + first_T, weights=weight_T, minlength=types * domains * experts
        )
        tokens_VE = all_VDE.reshape(types, domains, experts).sum(1)
        found.append(known + _entropy(tokens_VE) - _entropy(all_VDE))
    return numpy.maximum(found, 0)


def _entropy(mass: Floats) -> float:
    held = mass[mass > 0]
    return float(-(held * numpy.log(held)).sum())


def _against_null(value_LP: Floats) -> tuple[Measured, ...]:
    """Each row's first value against the others; corrected is less the null's mean."""
    p_L = p_values(value_LP.T)
    adjusted_L = false_discovery_control(p_L)
    return tuple(
        Measured(
            observed=float(row_P[0]),
            corrected=float(row_P[0] - row_P[1:].mean()),
            low=numpy.nan,
            high=numpy.nan,
            mean=float(row_P[1:].mean()),
            quantile_95=float(numpy.quantile(row_P[1:], 0.95)),
            p_value=float(p),
            adjusted_p=float(adjusted),
        )
        for row_P, p, adjusted in zip(value_LP, p_L, adjusted_L, strict=True)
    )
