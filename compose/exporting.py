"""Write one expert of a routed model as the stock dense checkpoint that its one-hot route is.

O/I out/in features, E experts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

import moiety.compose.routed  # noqa: F401
from moiety.compose.routed.model import RoutedLayout
from moiety.errors import InputError
from moiety.experts import packing
from moiety.experts.architecture import Architecture
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.companions import copy_companions
from moiety.experts.kernels import reference
from moiety.experts.quantizer import PackedConfig
from moiety.experts.shards import write_weights
from moiety.files import check_new_folder, new_folder
from moiety.progress import SILENT, Progress

OURS = ("model_type", "architectures", "quantization_config", "auto_map", "moiety")
ROUTER = ".router."


def layout_of(model: Checkpoint) -> RoutedLayout | None:
    """What is routed in a model of our own class; None of any other."""
    found = getattr(model.config, "moiety", None)
    is_ours = isinstance(found, dict) and "architecture" in found
    return RoutedLayout.model_validate(found) if is_ours else None


def export_expert(
    model: str | Path, expert: str, out: str | Path, progress: Progress = SILENT
) -> Path:
    """Write an expert of a routed model dense, with the composite's shared part, and give `out`.

    It opens without moiety and computes what the composite does when every token goes to that
    expert. Its router is lost: no stock layout has one. InputError when the model is not routed,
    has no such expert, or is damaged; OutputError when `out` cannot be made.
    """
    source, out = Checkpoint(model), Path(out)
    layout, packed = layout_of(source), PackedConfig.of(source.config)
    if layout is None or packed is None:
        raise InputError(
            f"expected a routed model in {source.folder}, but it is of another kind; export a "
            "mixture or packed model whole, without naming an expert"
        )
    if expert not in layout.experts:
        raise InputError(
            f"expected one of the composite's experts, {', '.join(layout.experts)}, "
            f"but it is {expert}"
        )
    check_new_folder(out)
    config = _stock_config(source.config, layout.architecture)
    tensors = _tensors(source, packed, Architecture(config), layout.experts.index(expert))
    with new_folder(out) as scratch:
        write_weights(scratch, progress.track(tensors, "write tensors"))
        config.save_pretrained(scratch)
        copy_companions(source.folder, scratch)
    return out


def _stock_config(routed: PretrainedConfig, architecture: str) -> PretrainedConfig:
    fields: dict[str, Any] = {n: v for n, v in routed.to_dict().items() if n not in OURS}
    kind = CONFIG_MAPPING[architecture]
    config = kind(**fields)
    model = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[kind])
    config.architectures = [model.__name__]
    return config


def _tensors(
    source: Checkpoint, packed: PackedConfig, stock: Architecture, index: int
) -> Iterator[tuple[str, Tensor]]:
    routed = set(packed.modules)
    for name in source:
        module, _, end = name.rpartition(".")
        if ROUTER in f".{name}" or end.startswith("experts"):
            continue
        if module in routed and end == "weight":
            continue
        change = f"{module}.experts_bias" if end == "bias" else f"{module}.experts"
        has_change = change in source.files and end in ("weight", "bias")
        yield name, _sum(source[name], source[change][index] if has_change else None)
    for module in sorted(routed):
        own_OI = _matrix(source, packed, stock, module, index)
        base = f"{module}.weight"
        yield base, own_OI if base not in source.files else _sum(source[base], own_OI)
        own_bias = f"{module}.experts_bias"
        if own_bias in source.files and f"{module}.bias" not in source.files:
            yield f"{module}.bias", source[own_bias][index].clone()


def _sum(base: Tensor, change: Tensor | None) -> Tensor:
    return base if change is None else (base.float() + change.float()).to(base.dtype)


def _matrix(
    source: Checkpoint, packed: PackedConfig, stock: Architecture, module: str, index: int
) -> Tensor:
    """One expert's matrix (O, I) of a routed linear, or its difference to the base."""
    name, pattern = f"{module}.experts", packed.pattern_of(module)
    _rows, width = stock.matrices(module)[f"{module}.weight"]
    values, mask = source[name][index], source[f"{name}_mask"][index]
    scale = source[f"{name}_scale"][index] if f"{name}_scale" in source.files else None
    packing.check(name, values, mask, width, pattern, scale, packed.values)
    dense_OI = reference.expand(values, mask, width, scale)
    dtype = getattr(source.config, "dtype", None)
    whole = f"{module}.weight" not in source.files
    return dense_OI.to(dtype) if whole and isinstance(dtype, torch.dtype) else dense_OI
