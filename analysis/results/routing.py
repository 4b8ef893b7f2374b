"""Everything that is known of one trace."""

from dataclasses import dataclass
from typing import Any

from moiety.analysis.results.measured import LayerMeasure
from moiety.analysis.results.parts import (
    Cells,
    Coactivation,
    Distances,
    Flow,
    Phase,
    Positions,
    Repetition,
    Vocabulary,
)
from moiety.analysis.results.serial import CONFIG, Floats, Integers, to_dict
from moiety.analysis.results.shown import Shown
from moiety.analysis.trace.file import Header


@dataclass(frozen=True, kw_only=True)
class RoutingSummary(Shown):
    """The statistics of one trace; domains, layers and experts in the order of `header`.

    Balance: `load_LE` share of all routes (of all weight where every token goes to every expert),
    `max_violation_L` its MaxVio, `load_entropy_L` its entropy over that of an even load,
    `entropy_DL` mean entropy of the gates in nats.
    Shares: `share_DLE` mean routing weight, `top_share_DLE` share of tokens by first expert,
    `chosen_share_DLE` share of tokens that chose the expert at all (chance: active / experts).

    Domains against experts, of the routes that `counted` names (`first`: the expert of most
    weight; `chosen`: every active one): `information` in nats, `nmi` normalised by sqrt(H(E) H(D)),
    `cramers_v` (overall: root of the mean square), and `matching`, the mean share of a domain's routes that goes to the expert that the
    best one-to-one matching gives it, `matched_LD` (-1: none left). Domains weigh the same.
    `own_expert` is the expert index of each domain that has one by name, `own_share_DL` the share
    of its tokens that go first to it (NaN without one), `own_share` that share as mean over those
    domains (None without any).

    `cells`, `distances`, `coactivation` (None with one active expert or all), `flow` (None with
    one layer), `vocabulary`, `repetition`, `positions`, `phases` by name: see their classes.

    `loss_D` mean nats per token. `permutations` and `resamples` were drawn from `seed`;
    `smallest_p` is the least p-value that so many permutations of so few documents could give.
    """

    __pydantic_config__ = CONFIG
    header: Header
    counted: str
    permutations: int
    resamples: int
    seed: int
    smallest_p: float
    share_DLE: Floats
    top_share_DLE: Floats
    chosen_share_DLE: Floats
    load_LE: Floats
    max_violation_L: Floats
    load_entropy_L: Floats
    entropy_DL: Floats
    loss_D: Floats
    information: LayerMeasure
    nmi: LayerMeasure
    cramers_v: LayerMeasure
    matching: LayerMeasure
    matched_LD: Integers
    own_expert: dict[str, int]
    own_share_DL: Floats
    own_share: LayerMeasure | None
    cells: Cells
    distances: Distances
    coactivation: Coactivation | None
    flow: Flow | None
    vocabulary: Vocabulary
    repetition: Repetition
    positions: Positions
    phases: dict[str, Phase]

    @property
    def normalized_mutual_information(self) -> float:
        """I / sqrt(H(E) H(D)) of domain and expert, domains equal, mean over layers."""
        return self.nmi.overall.observed

    @property
    def own_domain_share(self) -> dict[str, float]:
        """Share of each domain's tokens that go first to its expert, mean over layers."""
        means = self.own_share_DL.mean(1)
        domains = self.header.domains
        return {name: float(means[domains.index(name)]) for name in self.own_expert}

    @property
    def loss(self) -> dict[str, float]:
        """Mean loss of each domain in nats per token."""
        return dict(zip(self.header.domains, self.loss_D.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `moiety.analysis.results.from_dict` reads it again."""
        return to_dict(self)
