"""What 50 % sparsity does at home and away: models by domain.

D domains, E experts.
"""

from dataclasses import dataclass

from moiety.analysis.results.measured import Interval
from moiety.analysis.results.serial import CONFIG
from moiety.analysis.results.shown import Shown


@dataclass(frozen=True, kw_only=True)
class Retention(Shown):
    """Nats per token of every model on every domain, all with intervals over documents.

    `base`, `composite` (None where there is none), `dense` and `sparse` (by expert, then domain).
    `change` is sparse less dense, paired by document: at home where expert and domain bear one
    name, away elsewhere. `retained` is the share of a finetune's gain over the base at its home
    domain that is left in the sparse expert: (base - sparse) / (base - dense); by expert, with
    the composite's under `composite_retained`. `away` and `home` are the mean changes.
    """

    __pydantic_config__ = CONFIG
    experts: tuple[str, ...]
    domains: tuple[str, ...]
    documents: dict[str, int]
    context_length: int
    seed: int
    base: dict[str, Interval]
    dense: dict[str, dict[str, Interval]]
    sparse: dict[str, dict[str, Interval]]
    change: dict[str, dict[str, Interval]]
    home: Interval
    away: Interval
    retained: dict[str, Interval]
    composite: dict[str, Interval] | None = None
    composite_retained: dict[str, Interval] | None = None
