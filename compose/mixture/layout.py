"""Where the parts of finetunes of one architecture stand in the stock mixture that holds them."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from moiety.compose.mixture.families import HOLDERS, WHY_NOT, Family, Unfit
from moiety.compose.mixture.fields import carried, lost
from moiety.errors import InputError
from moiety.experts.architecture import Architecture

Layers = Literal["all"] | Sequence[int]
MATRICES = ("gate_proj", "up_proj", "down_proj")
FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight(_mask|_scale)?")
ROUTED = "kind: routed holds it"


@dataclass(frozen=True)
class Layout:
    """The mixture that holds a dense architecture, and which of its layers have experts.

    `fields` are those of the mixture's configuration that follow from the dense one.
    """

    family: Family
    dense: PretrainedConfig
    layers: tuple[int, ...]
    fields: Mapping[str, Any]

    def is_expert(self, name: str) -> bool:
        """Whether a tensor of a finetune (values, mask or scales) belongs to its expert."""
        match = FFN.fullmatch(name)
        return match is not None and int(match[1]) in self.layers

    def is_shared(self, name: str) -> bool:
        """Whether a tensor of the dense architecture belongs to the shared part."""
        return name in self._stored and not self.is_expert(name)

    @functools.cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset(Architecture(self.dense).shapes)

    @property
    def shared_names(self) -> list[str]:
        """Names of the whole shared part."""
        return sorted(name for name in self._stored if not self.is_expert(name))

    def gate(self, layer: int) -> str:
        """Name of a gate's weight in memory."""
        return self.family.places.gate.format(layer=layer)

    def stored_gate(self, layer: int) -> str:
        """Name of a gate's weight on disk."""
        return self.family.places.stored_gate.format(layer=layer)

    def experts_module(self, layer: int) -> str:
        """Name of the module in memory that holds a layer's experts."""
        return self.family.places.experts.format(layer=layer)


def layout_of(dense: PretrainedConfig, layers: Layers = "all") -> Layout:
    """The first stock mixture that holds finetunes of this architecture exactly.

    `layers` are those with experts. Raises InputError with the reason when there is none.
    """
    routed = _routed(dense, layers)
    if dense.model_type not in HOLDERS:
        reason = WHY_NOT.get(dense.model_type)
        raise InputError(
            f"expected a base of type {', '.join(HOLDERS)}, but it is {dense.model_type}; "
            f"no stock mixture is known that would hold it exactly"
            f"{f' (none has {reason})' if reason else ''}; {ROUTED}"
        )
    reasons: list[str] = []
    for family in HOLDERS[dense.model_type]:
        try:
            fields = family.fit(dense, routed)
        except Unfit as error:
            reasons.append(f"{family.config_class.model_type}: {error}")
            continue
        unplaced = list(lost(dense, family.looked_at, family.config_class))
        if not unplaced:
            return Layout(family, dense, routed, {**carried(dense), **fields})
        reasons.append(f"{family.config_class.model_type}: {' and '.join(unplaced)}")
    raise InputError(
        f"expected a {dense.model_type} base that a stock mixture holds exactly, but none does "
        f"({'; '.join(reasons)}); {ROUTED}"
    )


def check_mixture(dense: PretrainedConfig, layers: Layers = "all") -> None:
    """Raise InputError unless a stock mixture holds this architecture with experts in `layers`."""
    layout_of(dense, layers)


def _routed(dense: PretrainedConfig, layers: Layers) -> tuple[int, ...]:
    count = getattr(dense, "num_hidden_layers", 0)
    if layers == "all":
        return tuple(range(count))
    strange = sorted(layer for layer in set(layers) if layer not in range(count))
    if strange:
        raise InputError(
            f"compose.layers must be within 0..{count - 1}, the layers of the base, "
            f"but it has {', '.join(str(layer) for layer in strange)}"
        )
    if not layers:
        raise InputError("compose.layers must be all or name at least one layer, but it is empty")
    return tuple(sorted(set(int(layer) for layer in layers)))
