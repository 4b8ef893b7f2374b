"""Our own thin model class: any stock decoder whose linears are routed.

`config.moiety` says what is routed (`RoutedLayout`), `config.quantization_config` how the
experts' matrices are packed. The class is a subclass of the stock one, made when a checkpoint
names its architecture, so that caches, generation, attention kernels and device maps are
transformers' own.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from moiety.compose.routed.modules import (
    RoutedLinear,
    Routes,
    route_before,
    route_embedding,
    route_norm,
)
from moiety.errors import InputError
from moiety.experts.calibrate import decoder_blocks
from moiety.experts.quantizer import PackedConfig
from moiety.experts.sites import site_of
from moiety.files import write_text
from moiety.routers import Router

MODEL_TYPE = "moiety_routed"
SHIM = "moiety_routed.py"
SHIM_TEXT = '''"""Lets transformers open this checkpoint without being told to import moiety (pip install moiety)."""

from moiety.compose.routed import RoutedConfig, RoutedForCausalLM

__all__ = ["RoutedConfig", "RoutedForCausalLM"]
'''
AUTO_MAP = {
    "AutoConfig": "moiety_routed.RoutedConfig",
    "AutoModelForCausalLM": "moiety_routed.RoutedForCausalLM",
}


class RoutedLayout(BaseModel):
    """What is routed in a model, as `config.moiety` has it.

    `experts` are their names, `architecture` the stock model type, `base` whether the dense
    weights stay under the routed ones; `routers` is `layer` or `split` (attention, FFN).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    experts: list[str]
    architecture: str
    base: bool
    top_k: int
    routers: str
    norms: bool = False
    embeddings: bool = False
    head: bool = False


class RoutedConfig(PretrainedConfig):
    """Configuration of a routed model; opening one gives the stock configuration's subclass."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of the architecture that `config_dict` names."""
        layout = config_dict.get("moiety") or {}
        own = config_class(str(layout.get("architecture")))
        return own.from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: `save_pretrained` writes its own shim."""


class RoutedForCausalLM:
    """Opens routed models: what `auto_map` of a checkpoint names."""

    config_class = RoutedConfig

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """As of the stock class, whichever the checkpoint is made of."""
        config = kwargs.pop("config", None) or RoutedConfig.from_pretrained(folder)
        return model_class(type(config)).from_pretrained(folder, *args, config=config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Nothing: `save_pretrained` writes its own shim."""


class _Routed(PreTrainedModel):
    """What routed models add to their stock class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install(self, config)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As of the stock class, with the shim beside it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_shim(Path(save_directory))


def write_shim(folder: Path) -> None:
    """The module in a checkpoint that `auto_map` names."""
    write_text(folder / SHIM, SHIM_TEXT)


@functools.cache
def config_class(architecture: str) -> type[PretrainedConfig]:
    """The routed configuration of a stock model type; InputError for one that has no decoder."""
    if architecture not in CONFIG_MAPPING or (
        CONFIG_MAPPING[architecture] not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise InputError(
            f"expected moiety.architecture to be a causal language model that transformers knows, "
            f"but it is {architecture!r}"
        )
    stock = CONFIG_MAPPING[architecture]
    fields = {"model_type": MODEL_TYPE, "__module__": __name__}
    made = cast(type[PretrainedConfig], type(f"Routed{stock.__name__}", (stock,), fields))
    AutoModelForCausalLM.register(made, model_class(made), exist_ok=True)
    return made


@functools.cache
def model_class(config: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """The routed model of a routed configuration."""
    stock = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[config.__mro__[1]])
    fields = {"config_class": config, "__module__": __name__}
    return cast(type[PreTrainedModel], type(f"Routed{stock.__name__}", (_Routed, stock), fields))


def install(model: PreTrainedModel, config: Any) -> None:
    """Put routers and routed layers into a stock model, empty, as `config` says."""
    layout = RoutedLayout.model_validate(config.moiety)
    packing = PackedConfig.of(config)
    if packing is None:
        raise InputError("expected a quantization_config that names the routed matrices")
    prefix, blocks = decoder_blocks(model)
    width = width_of(model)
    found: set[str] = set()
    for number, block in enumerate(blocks):
        name = f"{prefix}.{number}"
        linears = [m.removeprefix(f"{name}.") for m in packing.modules if m.startswith(f"{name}.")]
        last = _route_block(name, block, linears, layout, packing, width)
        found |= {f"{name}.{linear}" for linear in linears}
        if number == len(blocks) - 1 and layout.norms:
            for norm in _final_norms(model, prefix):
                route_norm(norm, len(layout.experts), last)
    if layout.embeddings:
        embedding = model.get_input_embeddings()
        embedding.router = Router(width, len(layout.experts), layout.top_k)
        route_embedding(cast(nn.Embedding, embedding), len(layout.experts), Routes())
    if layout.head:
        found.add(_route_head(model, layout, packing, width))
    strange = sorted(set(packing.modules) - found)
    if strange:
        raise InputError(
            f"expected routed matrices in the decoder's blocks, but {strange[0]} is none of those"
        )


def width_of(model: PreTrainedModel) -> int:
    """A model's width: that of its embeddings."""
    return cast(nn.Embedding, model.get_input_embeddings()).embedding_dim


def _route_block(
    name: str,
    block: nn.Module,
    linears: list[str],
    layout: RoutedLayout,
    packing: PackedConfig,
    width: int,
) -> Routes:
    """Route the linears of one decoder block; gives the routes of its (last) router."""
    routes = Routes()
    for site, members in _sites(linears, layout.routers):
        routes = Routes()
        place = block.get_submodule(site)
        place.router = Router(width, len(layout.experts), layout.top_k)
        route_before(place, routes)
        for linear in members:
            _replace(block, linear, f"{name}.{linear}", layout, packing, routes)
        if layout.norms:
            for norm in _norms(place, width):
                route_norm(norm, len(layout.experts), routes)
    return routes


def _sites(linears: list[str], routers: str) -> Iterator[tuple[str, list[str]]]:
    """The modules of a block whose input is routed on, and the linears each decides for."""
    if routers == "layer":
        yield "", linears
        return
    for site in ("attention", "ffn"):
        members = [linear for linear in linears if site_of(linear) == site]
        if members:
            yield _common_parent(members), members


def _common_parent(members: list[str]) -> str:
    parents = [member.split(".")[:-1] for member in members]
    shared = [parts[0] for parts in zip(*parents, strict=False) if len(set(parts)) == 1]
    return ".".join(shared)


def _replace(
    parent: nn.Module,
    linear: str,
    name: str,
    layout: RoutedLayout,
    packing: PackedConfig,
    routes: Routes,
) -> RoutedLinear:
    stock = parent.get_submodule(linear)
    if not isinstance(stock, nn.Linear):
        raise InputError(f"expected {name} to be a linear layer, but it is {type(stock).__name__}")
    routed = RoutedLinear(
        stock,
        len(layout.experts),
        packing.pattern_of(name),
        packing.values,
        routes,
        base=layout.base,
    )
    place, _, attribute = linear.rpartition(".")
    setattr(parent.get_submodule(place), attribute, routed)
    return routed


def _route_head(
    model: PreTrainedModel, layout: RoutedLayout, packing: PackedConfig, width: int
) -> str:
    """Route the output head on its own input."""
    name = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    routes = Routes()
    head = _replace(model, name, name, layout, packing, routes)
    head.router = Router(width, len(layout.experts), layout.top_k)
    route_before(head, routes)
    return name


def _norms(place: nn.Module, width: int) -> list[nn.Module]:
    """RMS norms of the model's width below a module."""
    return [
        module
        for module in place.modules()
        if type(module).__name__.endswith("RMSNorm")
        and tuple(module.get_parameter("weight").shape) == (width,)
    ]


def _final_norms(model: PreTrainedModel, prefix: str) -> list[nn.Module]:
    """Norms after the last block."""
    owner = model.get_submodule(prefix.rpartition(".")[0])
    return [m for m in owner.children() if type(m).__name__.endswith("RMSNorm")]


AutoConfig.register(MODEL_TYPE, RoutedConfig, exist_ok=True)
