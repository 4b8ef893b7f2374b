"""How much of routing is the token's identity: syntax is not to be sold as domain.

T tokens, V token types, L routed layers, E experts, D domains, M documents, P permutations.
"""

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from scipy.special import entr, xlogy
from scipy.stats import false_discovery_control

from moiety.analysis.results.measured import Measured
from moiety.analysis.results.parts import Vocabulary
from moiety.analysis.statistics.measures import Floats
from moiety.analysis.statistics.resampling import Documents, Draws, p_values

Codes = NDArray[numpy.integer]
SHUFFLES = 2
MOST_TOKENS = 200_000
MOST_PERMUTATIONS = 49
REFERENCE_PERMUTATIONS = 5
LEAST_INFORMATION = 1e-6


def vocabulary(
    first_LT: Codes, token_T: Codes, document_T: Codes, documents: Documents, draws: Draws
) -> Vocabulary:
    """Vocabulary specialisation over its shuffled null, and I(expert; domain | token).

    `token_T` are token ids, `document_T` rows of `documents`. The conditional information is that
    of at most about MOST_TOKENS tokens, whole documents of every domain, and of types that occur
    in several documents; what token identity explains is held against the same tokens with their
    types shuffled, for which the estimate errs alike.
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
    tokens, shared = _informative(type_T, document_T, documents, draws.seed)
    conditional_LP = tokens.conditional(first_LT, documents, draws)
    overall = _against_null(conditional_LP.mean(0)[None])[0]
    return Vocabulary(
        specialisation_L=numpy.array(
            [_specialisation(first_T, type_T, types, experts) for first_T in first_LT]
        ),
        shuffled_L=numpy.array(shuffled_RL).mean(0),
        conditional=overall,
        conditional_L=_against_null(conditional_LP),
        explained=_explained(overall.corrected, tokens, first_LT, documents, draws),
        types=types,
        shared=shared,
    )


def _specialisation(first_T: Codes, type_T: Codes, types: int, experts: int) -> float:
    table_VE = numpy.bincount(type_T * experts + first_T, minlength=types * experts)
    table_VE = table_VE.reshape(types, experts)
    return float((table_VE.max(1) / table_VE.sum(1)).mean())


def _explained(
    known: float, tokens: "_Tokens", first_LT: Codes, documents: Documents, draws: Draws
) -> float:
    """1 - information given the token / information given a token's type drawn at random."""
    few = Draws(min(draws.permutations, REFERENCE_PERMUTATIONS), 0, draws.seed)
    reference_P = tokens.shuffled(draws.seed).conditional(first_LT, documents, few).mean(0)
    reference = float(reference_P[0] - reference_P[1:].mean())
    return 1 - known / reference if reference > LEAST_INFORMATION else numpy.nan


@dataclass(frozen=True)
class _Tokens:
    """Rows of a trace with their types, numbered from 0, and their documents."""

    rows_T: Codes
    type_T: Codes
    document_T: Codes

    def shuffled(self, seed: int) -> "_Tokens":
        """The same tokens with their types dealt out again."""
        generator = numpy.random.default_rng((seed, 8))
        return _Tokens(self.rows_T, generator.permutation(self.type_T), self.document_T)

    def conditional(self, first_LT: Codes, documents: Documents, draws: Draws) -> Floats:
        """I(expert; domain | type) of every layer: observed, then permuted (L, 1 + P)."""
        permutations = min(draws.permutations, MOST_PERMUTATIONS)
        if not len(self.rows_T):
            return numpy.zeros((len(first_LT), 1 + permutations))
        label_PM = Draws(permutations, 0, draws.seed).labels(documents.domain_M)
        chosen_LT = first_LT[:, self.rows_T]
        columns = [
            _information(chosen_LT, self.type_T, label_M[self.document_T], documents)
            for label_M in label_PM
        ]
        return numpy.stack(columns, 1)


def _informative(
    type_T: Codes, document_T: Codes, documents: Documents, seed: int
) -> tuple[_Tokens, int]:
    """The tokens that can tell something, and how many types they are of."""
    rows_T = numpy.flatnonzero(_sampled(document_T, documents, seed)[document_T])
    size = int(document_T.max()) + 1
    pairs = numpy.unique(type_T[rows_T].astype(numpy.int64) * size + document_T[rows_T])
    several_V = numpy.bincount(pairs // size, minlength=int(type_T.max()) + 1) > 1
    rows_T = rows_T[several_V[type_T[rows_T]]]
    types_T = numpy.unique(type_T[rows_T], return_inverse=True)[1]
    return _Tokens(rows_T, types_T, document_T[rows_T]), int(several_V.sum())


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


def _information(first_LT: Codes, type_T: Codes, domain_T: Codes, documents: Documents) -> Floats:
    """Nats of I(E; D | V) = H(V, D) + H(V, E) - H(V) - H(V, D, E), domains weighing equally.

    Entropies of weighted counts: c tokens of weight w have -c w log(c w), and c log c is looked up.
    """
    domains, experts = documents.domains, documents.counts_LME.shape[2]
    types = int(type_T.max()) + 1
    tokens_D = numpy.bincount(domain_T, minlength=domains)
    weight_D = 1 / (numpy.count_nonzero(tokens_D) * numpy.maximum(tokens_D, 1))
    both_T = domain_T.astype(numpy.int64) * types + type_T
    count_DV = numpy.bincount(both_T, minlength=domains * types).reshape(domains, types)
    counts = numpy.arange(int(count_DV.max()) + 1)
    terms = xlogy(counts, counts)
    known = _entropy(count_DV, weight_D, terms) - entr(weight_D @ count_DV).sum()
    found = []
    for first_T in first_LT:
        cells = numpy.bincount(both_T * experts + first_T, minlength=domains * types * experts)
        cells_DC = cells.reshape(domains, types * experts)
        mixed = entr(weight_D @ cells_DC).sum()
        found.append(known + mixed - _entropy(cells_DC, weight_D, terms))
    return numpy.maximum(found, 0)


def _entropy(count_DC: Codes, weight_D: Floats, terms: Floats) -> float:
    """Nats of all cells, each row's tokens of one weight."""
    tokens_D = count_DC.sum(1)
    return float(-(weight_D * (terms[count_DC].sum(1) + tokens_D * numpy.log(weight_D))).sum())


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
