"""Build a mixture: packed FFN experts in a stock MoE."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from moiety.compose.mixture.account import accounting
from moiety.compose.mixture.config import mixture_config, packed_mixture
from moiety.compose.mixture.layout import Layout, layout_of
from moiety.compose.mixture.tensors import mixture_tensors, write_mixture, zero_gates
from moiety.compose.recipe import Mixture
from moiety.compose.routing import RoutingBuilder
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.quantizer import PackedConfig
from moiety.experts.unpack import dense_view


class MixtureBuilder(RoutingBuilder):
    """Stages of a mixture."""

    @cached_property
    def layout(self) -> Layout:
        """The stock mixture that holds the base's architecture, with experts where asked for."""
        assert isinstance(self.recipe.compose, Mixture)
        return layout_of(self.base.config, self.recipe.compose.layers)

    def is_shared(self, name: str) -> bool:
        """Everything but the FFNs of the layers with experts."""
        return self.layout.is_shared(name)

    def facts(self) -> dict[str, Any]:
        """Those of every composite with gates, and the architecture."""
        return {**super().facts(), "architecture": self.layout.family.model_class}

    def tensors(self) -> dict[str, Any]:
        """Where every tensor of every input went."""
        return accounting(self.layout, self.base, self.finetunes, self.use_of_shared)

    @property
    def packed(self) -> list[Mapping[str, Tensor]]:
        """The packed experts' tensors, in order."""
        return [Checkpoint(folder) for folder in self.experts.values()]

    @property
    def packing(self) -> PackedConfig | None:
        """How the mixture's experts are packed."""
        each = {n: PackedConfig.of(Checkpoint(f).config) for n, f in self.experts.items()}
        return packed_mixture(self.layout, each)

    def twin(self, name: str | None) -> dict[str, Tensor]:
        """The shared part and one expert's FFNs, or the base's in their place."""
        source = self.base if name is None else dense_view(self.experts[name])
        own = {key: source[key].float() for key in source if self.layout.is_expert(key)}
        return {**{key: tensor.float() for key, tensor in self.shared_tensors.items()}, **own}

    def assemble(
        self,
        folder: Path,
        shared_part: Mapping[str, Tensor],
        gates: Mapping[str, Tensor] | None,
        *,
        dense: bool = False,
    ) -> None:
        """Write the mixture with these shared tensors and gates."""
        names = self.recipe.names
        experts = list(self.finetunes.values()) if dense else self.packed
        packed = None if dense else self.packing
        config = mixture_config(self.layout, names, self.settings.top_k, packed)
        dtype = next(iter(shared_part.values())).dtype
        gates = gates or zero_gates(self.layout, len(names), dtype)
        tensors = mixture_tensors(self.layout, shared_part, experts, gates)
        write_mixture(folder, config, tensors, self.tokenizer, self.generation)
