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
    follow,
    route_before,
    route_embedding,
    route_norm,
)
from moiety.compose.shim import write_shim
from moiety.errors import InputError
from moiety.experts.calibrate import decoder_blocks
from moiety.experts.quantizer import PackedConfig
from moiety.experts.sites import site_of
from moiety.routers import Flow, Router, RouterSpec

MODEL_TYPE = "moiety_routed"


class RoutedLayout(BaseModel):
    """What is routed in a model, as `config.moiety` has it.

    `experts` are their names, `architecture` the stock model type, `base` whether the dense
    weights stay under the routed ones. `router` is what every router is; `routers` says whether
    there is one a `layer` or `split` ones (attention, FFN), `span` for how many layers each
    decides.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    experts: list[str]
    architecture: str
    base: bool
    router: RouterSpec
    routers: str
    span: int = 1
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


class _Routed(PreTrainedModel):
    """What routed models add to their stock class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install(self, config)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As of the stock class, with the shim beside it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_shim(Path(save_directory), RoutedConfig)


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
    packing = PackedConfig.of(config)
    if packing is None:
        raise InputError("expected a quantization_config that names the routed matrices")
    prefix, blocks = decoder_blocks(model)
    made = _Making(model, RoutedLayout.model_validate(config.moiety), packing, len(blocks))
    follow(model.get_submodule(prefix.rpartition(".")[0]), blocks[0], made.flow)
    found: set[str] = set()
    for number, block in enumerate(blocks):
        name = f"{prefix}.{number}"
        linears = [m.removeprefix(f"{name}.") for m in packing.modules if m.startswith(f"{name}.")]
        made.route_block(number, name, block, linears)
        found |= {f"{name}.{linear}" for linear in linears}
    if made.layout.norms:
        for norm in final_norms(model, prefix).values():
            route_norm(norm, made.experts, made.routes)
    if made.layout.embeddings:
        embedding = cast(nn.Embedding, model.get_input_embeddings())
        embedding.router = made.router(plain=True)
        route_embedding(embedding, made.experts, Routes())
    if made.layout.head:
        found.add(made.route_head())
    strange = sorted(set(packing.modules) - found)
    if strange:
        raise InputError(
            f"expected routed matrices in the decoder's blocks, but {strange[0]} is none of those"
        )


class _Making:
    """A stock model on its way to a routed one; `routes` are those of the latest router."""

    def __init__(
        self, model: PreTrainedModel, layout: RoutedLayout, packing: PackedConfig, layers: int
    ) -> None:
        self.model, self.layout, self.packing = model, layout, packing
        self.flow = Flow(layout.router.horizons, layers)
        self.width, self.experts = width_of(model), len(layout.experts)
        self.routes = Routes()
        self._made = 0

    def router(self, *, plain: bool = False) -> Router:
        """One more router; a plain one remembers nothing of earlier tokens."""
        spec = self.layout.router.plain() if plain else self.layout.router
        self._made += 1
        return Router(self.width, self.experts, spec, self.flow, self._made - 1)

    def route_block(self, number: int, name: str, block: nn.Module, linears: list[str]) -> None:
        """Route the linears of one decoder block."""
        for site, members in _sites(linears, self.layout.routers):
            place = block.get_submodule(site)
            if number % self.layout.span == 0:
                self.routes = Routes()
                place.router = self.router()
                route_before(place, self.routes)
            for linear in members:
                self._replace(block, linear, f"{name}.{linear}")
            if self.layout.norms:
                for norm in norms_of(place, self.width).values():
                    route_norm(norm, self.experts, self.routes)

    def route_head(self) -> str:
        """Route the output head on its own input; gives its name."""
        name = name_of(self.model, self.model.get_output_embeddings())
        self.routes = Routes()
        head = self._replace(self.model, name, name)
        head.router = self.router(plain=True)
        route_before(head, self.routes)
        return name

    def _replace(self, parent: nn.Module, linear: str, name: str) -> RoutedLinear:
        stock = parent.get_submodule(linear)
        if not isinstance(stock, nn.Linear):
            raise InputError(
                f"expected {name} to be a linear layer, but it is {type(stock).__name__}"
            )
        routed = RoutedLinear(
            stock,
            self.experts,
            self.packing.pattern_of(name),
            self.packing.values,
            self.routes,
            base=self.layout.base,
        )
        place, _, attribute = linear.rpartition(".")
        setattr(parent.get_submodule(place), attribute, routed)
        return routed


def width_of(model: PreTrainedModel) -> int:
    """A model's width: that of its embeddings."""
    return cast(nn.Embedding, model.get_input_embeddings()).embedding_dim


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


def name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    """Name of a module in its model; there must be one."""
    return next(name for name, module in model.named_modules() if module is wanted)


def norms_of(place: nn.Module, width: int) -> dict[str, nn.Module]:
    """RMS norms of the model's width below a module, by their names in it."""
    return {
        name: module
        for name, module in place.named_modules()
        if _is_norm(module) and tuple(module.get_parameter("weight").shape) == (width,)
    }


def final_norms(model: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Norms after the last of the blocks in `prefix`, by their full names."""
    owner = prefix.rpartition(".")[0]
    children = model.get_submodule(owner).named_children()
    return {f"{owner}.{name}".lstrip("."): module for name, module in children if _is_norm(module)}


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


AutoConfig.register(MODEL_TYPE, RoutedConfig, exist_ok=True)
