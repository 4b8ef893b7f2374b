"""What a wrong route costs: losses with experts forced, removed or exchanged.

D domains, E experts, M documents.
"""

from dataclasses import dataclass

from moiety.analysis.results.measured import Interval
from moiety.analysis.results.serial import CONFIG, Floats, Number
from moiety.analysis.results.shown import Shown


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one intervention does to the loss, in nats per token above the model's own route.

    `expert` is what it is about (`layer` too, None where it is all layers), `by_domain` and the
    mean over domains `overall` have intervals over documents, `p_value` is of a sign-flip test of
    documents (two-sided, all domains), `adjusted_p` after Benjamini and Hochberg.
    """

    __pydantic_config__ = CONFIG
    expert: int
    layer: int | None
    by_domain: dict[str, Interval]
    overall: Interval
    p_value: Number
    adjusted_p: Number


@dataclass(frozen=True, kw_only=True)
class Swap:
    """Two experts exchanged: tokens of one go to the other and the other way round.

    `overall` is the change of loss; experts that can be exchanged for nothing are redundant:
    `redundant` says that the interval's upper end is at most the result's `margin`.
    """

    __pydantic_config__ = CONFIG
    first: int
    second: int
    by_domain: dict[str, Interval]
    overall: Interval
    redundant: bool


@dataclass(frozen=True, kw_only=True)
class TokenRegret:
    """Loss above the best expert of every token, by hindsight; `protocol` says which hindsight.

    Choosing the best of E after seeing the loss is optimistic. `by_domain` mean nats per token.
    """

    __pydantic_config__ = CONFIG
    protocol: str
    tokens: int
    by_domain: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Counterfactuals(Shown):
    """Losses of held-out documents under routes that the model did not choose.

    `forced_DE` is the loss of each domain when every token of every layer goes to one expert,
    `learned` that of the model's own routes (both nats per token). `best_expert` is the domain's
    best forced expert. Regrets are nats per token: `domain_regret` over the best expert of the
    domain, `document_regret` over the best one of each document, found by running all E: exact,
    but by hindsight. Both may be negative where mixing experts pays. `ablated`: the expert's
    contribution is dropped; `left_out`: the gate takes its next best instead (leave one out).
    `documents` have losses under every forced expert: (M, E), with `document_tokens` predicted
    tokens and `document_learned` losses. `protocols` explains each intervention in a sentence.
    """

    __pydantic_config__ = CONFIG
    model: str
    experts: tuple[str, ...]
    layers: tuple[str, ...]
    domains: tuple[str, ...]
    context_length: int
    seed: int
    protocols: dict[str, str]
    learned: dict[str, Interval]
    forced_DE: Floats
    best_expert: dict[str, str]
    domain_regret: dict[str, Interval]
    document_regret: dict[str, Interval]
    ablated: tuple[Change, ...]
    left_out: tuple[Change, ...]
    swaps: tuple[Swap, ...]
    margin: Number
    token_regret: tuple[TokenRegret, ...]
    document_domain: tuple[str, ...]
    document_tokens: tuple[int, ...]
    document_learned: Floats
    document_forced_ME: Floats
