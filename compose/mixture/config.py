"""The configuration of a mixture, and how its experts are packed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from moiety.compose.mixture.layout import MATRICES, Layout
from moiety.errors import InputError
from moiety.experts.modules import check_fusable
from moiety.experts.quantizer import PackedConfig


def mixture_config(
    layout: Layout, experts: Sequence[str], top_k: int, packed: PackedConfig | None
) -> PretrainedConfig:
    """The stock configuration for `experts`; `packed` says how they are (None: dense ones).

    The experts' names are kept under `moiety`, so that a composite can name its own routes.
    """
    family, dense = layout.family, layout.dense
    counts: dict[str, Any] = {family.experts: len(experts), "num_experts_per_tok": top_k}
    config = family.config_class(**layout.fields, **counts)
    config.architectures = [family.model_class]
    config.moiety = {"experts": list(experts)}
    if packed is not None:
        for module in packed.modules:
            rows, columns = dense.intermediate_size, dense.hidden_size
            check_fusable(packed.pattern_of(module), packed.values, rows, columns)
        config.quantization_config = packed
    return config


def packed_mixture(
    layout: Layout, experts: Mapping[str, PackedConfig | None]
) -> PackedConfig | None:
    """How the experts of a mixture are packed, from how each finetune is; None: not at all.

    One module holds a layer's experts, so they must share the pattern of that layer and the kind
    of values; InputError names two that differ.
    """
    kinds = {name: packed.values if packed else None for name, packed in experts.items()}
    _check_alike("the experts", "kind of values", kinds)
    patterns: dict[str, str] = {}
    for layer in layout.layers:
        found = {
            f"{name}'s {matrix}": _pattern(packed, f"model.layers.{layer}.mlp.{matrix}")
            for name, packed in experts.items()
            for matrix in MATRICES
        }
        _check_alike(f"the experts of layer {layer}", "pattern", found)
        if (pattern := next(iter(found.values()))) is not None:
            patterns[layout.experts_module(layer)] = pattern
    if not patterns:
        return None
    [(usual, _)] = Counter(patterns.values()).most_common(1)
    own = {module: pattern for module, pattern in patterns.items() if pattern != usual}
    kind = next(iter(kinds.values()))
    return PackedConfig(pattern=usual, modules=list(patterns), values=kind, patterns=own)


def _pattern(packed: PackedConfig | None, module: str) -> str | None:
    if packed is None or module not in packed.modules:
        return None
    return str(packed.pattern_of(module))


def _check_alike(what: str, quality: str, found: Mapping[str, str | None]) -> None:
    (first, one), *rest = found.items()
    for name, other in rest:
        if other != one:
            raise InputError(
                f"expected {what} to share one {quality}, because one module holds them all, but "
                f"{first} has {one or 'none'} and {name} has {other or 'none'}; prune them alike"
            )
