"""The parts of a routing summary that are not one number a layer.

D domains, L routed layers, E experts, B bins of position.
"""

from dataclasses import dataclass

from moiety.analysis.results.measured import Measured
from moiety.analysis.results.serial import CONFIG, Floats, Integers, Number


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Each domain and expert by itself: is P(expert | domain) other than in all domains?

    `difference_DLE` is the share of the domain's routes that go to the expert, less the mean share
    over domains; `p_DLE` two-sided over permuted documents, `adjusted_DLE` after Benjamini and
    Hochberg over all cells. `tested` cells, of which `found` have an adjusted p of at most 0.05.
    """

    __pydantic_config__ = CONFIG
    difference_DLE: Floats
    p_DLE: Floats
    adjusted_DLE: Floats
    tested: int
    found: int


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Jensen-Shannon distances (base 2, 0 to 1) between the domains' distributions over experts.

    `whole_LDD` of all documents. Like for like: `halves_LDD` the mean distance between half of one
    domain's documents and half of another's, its diagonal the two halves of one domain, which is
    the noise; `floor_LD` what 95 % of random splits of a domain stay under.
    """

    __pydantic_config__ = CONFIG
    whole_LDD: Floats
    halves_LDD: Floats
    floor_LD: Floats
    splits: int


@dataclass(frozen=True, kw_only=True)
class Coactivation:
    """Experts chosen together: `lift_LEE` is n_ab N / (n_a n_b) over all pairs of a token's routes.

    NaN on the diagonal and for experts never chosen. `chance` is the lift of routes drawn evenly
    without replacement, (A - 1) E / (A (E - 1)): below 1, since an expert is not chosen twice.
    """

    __pydantic_config__ = CONFIG
    lift_LEE: Floats
    chance: Number


@dataclass(frozen=True, kw_only=True)
class Flow:
    """From one routed layer to the next, by first expert (L is one less than there are layers).

    `share_LEE` are shares of all tokens, rows the earlier layer. `nmi_L` is their normalised mutual
    information, `chance_L` the same when tokens of a document are paired at random.
    """

    __pydantic_config__ = CONFIG
    share_LEE: Floats
    nmi_L: Floats
    chance_L: Floats


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """How much of routing is token identity.

    `specialisation_L` is the mean over token types of the largest P(expert | type), as OLMoE has
    it (arXiv:2409.02060, section 5.4), `shuffled_L` the same with routes shuffled over tokens:
    only the difference says anything. `conditional` is I(expert; domain | token) in nats, against
    domain labels permuted over documents: what of the domain is left once the token is known.
    `explained` is the share of I(expert; domain) that token identity accounts for, 1 -
    conditional / unconditional (both bias-corrected, overall), NaN without information.
    `types` counts token types, `shared` those that occur in several documents.
    """

    __pydantic_config__ = CONFIG
    specialisation_L: Floats
    shuffled_L: Floats
    conditional: Measured
    conditional_L: tuple[Measured, ...]
    explained: Number
    types: int
    shared: int


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """How often the next token of a window goes first to the same expert.

    `observed_DL`; `domain_DL` what independent draws from the domain's shares would give;
    `document_DL` the same from each document's own shares, so that what exceeds it is persistence
    from token to token.
    """

    __pydantic_config__ = CONFIG
    observed_DL: Floats
    domain_DL: Floats
    document_DL: Floats


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Routes by position in the window, in bins from `first_B` up to the next one's.

    `tokens_B`, mean `entropy_BL` of the gates in nats, mean `loss_B` in nats, `own_share_BL` of
    tokens that go first to their domain's expert (NaN without one). `nmi_L` of bin and first expert,
    `chance_L` the same with every window's routes rotated by a random number of tokens.
    """

    __pydantic_config__ = CONFIG
    first_B: Integers
    tokens_B: Integers
    entropy_BL: Floats
    loss_B: Floats
    own_share_BL: Floats
    nmi_L: Floats
    chance_L: Floats


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Tokens of one phase (prefill or decode): `lit_L` experts chosen at all, by layer."""

    __pydantic_config__ = CONFIG
    tokens: int
    share_LE: Floats
    lit_L: Integers
