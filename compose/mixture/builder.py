"""Build a mixture: packed FFN experts in a stock MoE."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from moiety.compose.mixture.tensors import (
    is_ffn,
    mixture_config,
    mixture_tensors,
    packed_mixture,
    write_mixture,
    zero_gates,
)
from moiety.compose.routing import RoutingBuilder
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.quantizer import PackedConfig


class MixtureBuilder(RoutingBuilder):
    """Stages of a mixture."""

    def is_shared(self, name: str) -> bool:
        """Everything but the FFNs."""
        return not is_ffn(name)

    @property
    def packed(self) -> list[Mapping[str, Tensor]]:
        """The packed experts' tensors, in order."""
        return [Checkpoint(folder) for folder in self.experts.values()]

    @property
    def packing(self) -> PackedConfig | None:
        """How the mixture's experts are packed."""
        each = {n: PackedConfig.of(Checkpoint(f).config) for n, f in self.experts.items()}
        return packed_mixture(self.base.config.num_hidden_layers, each)

    def assemble(
        self,
        folder: Path,
        shared_part: Mapping[str, Tensor],
        gates: Mapping[str, Tensor] | None,
        *,
        dense: bool = False,
    ) -> None:
        """Write the mixture with these shared tensors and gates."""
        experts = list(self.finetunes.values()) if dense else self.packed
        packed = None if dense else self.packing
        config = mixture_config(self.base.config, self.recipe.names, self.settings.top_k, packed)
        dtype = next(iter(shared_part.values())).dtype
        tensors = mixture_tensors(shared_part, experts, gates or zero_gates(config, dtype))
        write_mixture(folder, config, tensors, self.tokenizer, self.generation)
