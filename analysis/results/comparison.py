"""Two checkpoints or routers on the same text.

D domains, L routed layers, E experts of the first, F of the second.
"""

from dataclasses import dataclass

from moiety.analysis.results.measured import Interval
from moiety.analysis.results.serial import CONFIG, Floats, Integers
from moiety.analysis.results.shown import Shown


@dataclass(frozen=True, kw_only=True)
class GateSwap:
    """Nats per token by domain of two models and of each with the other's gates.

    `models` are their folders or ids, first and second.
    """

    __pydantic_config__ = CONFIG
    models: tuple[str, str]
    first: dict[str, Interval]
    second: dict[str, Interval]
    first_with_second: dict[str, Interval]
    second_with_first: dict[str, Interval]
    change_first: dict[str, Interval]
    change_second: dict[str, Interval]

    @property
    def reversed(self) -> "GateSwap":
        """The same with first and second exchanged."""
        return GateSwap(
            models=(self.models[1], self.models[0]),
            first=self.second,
            second=self.first,
            first_with_second=self.second_with_first,
            second_with_first=self.first_with_second,
            change_first=self.change_second,
            change_second=self.change_first,
        )


@dataclass(frozen=True, kw_only=True)
class Comparison(Shown):
    """Routes of the same tokens in two traces.

    `overlap_DL`: of the experts that a token went to in the first, the share that it went to in
    the second too (router saturation, OLMoE, arXiv:2409.02060); `jaccard_DL` shared over all;
    `top_DL` share with the same first expert; `chance_DL` is the overlap when tokens of a domain
    are paired at random. `overlap` and its interval over documents, mean over layers.
    `drift_DL`: Jensen-Shannon distance (base 2) between the two distributions over experts.
    `agreement_L`: adjusted mutual information of the first experts, 1 for the same partition of
    tokens whatever the experts' numbers, 0 for chance; `matched_LE` the second's expert that each
    of the first's is best matched with (-1 none). `weight_DL`: mean L1 distance of the
    routing weights, 0 to 2. What needs equally many experts (all but agreement and matching, and
    the losses) is NaN otherwise. `loss_change` is second less first, nats per token, paired.
    """

    __pydantic_config__ = CONFIG
    first: str
    second: str
    domains: tuple[str, ...]
    layers: tuple[str, ...]
    first_experts: tuple[str, ...]
    second_experts: tuple[str, ...]
    tokens: int
    seed: int
    overlap: dict[str, Interval]
    overlap_DL: Floats
    jaccard_DL: Floats
    top_DL: Floats
    chance_DL: Floats
    drift_DL: Floats
    weight_DL: Floats
    agreement_L: Floats
    matched_LE: Integers
    loss_change: dict[str, Interval]
    gate_swap: GateSwap | None = None
