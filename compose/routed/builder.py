"""Build a routed model: packed experts of every chosen linear, stacked beside the base's.

E experts, O/I out/in features, D model width, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moiety.compose.account import Use, account
from moiety.compose.recipe import Routed
from moiety.compose.routed.model import (
    RoutedConfig,
    RoutedLayout,
    config_class,
    final_norms,
    model_class,
    name_of,
    norms_of,
    width_of,
)
from moiety.compose.routing import RoutingBuilder
from moiety.compose.shim import write_shim
from moiety.errors import InputError
from moiety.experts.architecture import Architecture
from moiety.experts.calibrate import decoder_blocks
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.delta import TaskVector, open_delta
from moiety.experts.packing import DTYPES, LARGEST_CODE, pack
from moiety.experts.pattern import Pattern
from moiety.experts.quantizer import PackedConfig
from moiety.experts.shards import write_weights
from moiety.experts.unpack import dense_view
from moiety.routers import Router

ENDS = ("", "_mask", "_scale")


class RoutedBuilder(RoutingBuilder):
    """Stages of a routed model."""

    @property
    def settings(self) -> Routed:
        """The recipe's section `compose`."""
        assert isinstance(self.recipe.compose, Routed)
        return self.recipe.compose

    @property
    def pruned_from(self) -> Path | None:
        """With a dense base, task vectors are pruned."""
        return self.base.folder if self.settings.base == "dense" else None

    def open_expert(self, name: str) -> PreTrainedModel:
        """One sparse expert as a model of its own, on the base if it is a task vector."""
        if self.pruned_from is None:
            return super().open_expert(name)
        return open_delta(self.experts[name], self.base.folder)

    @cached_property
    def packing(self) -> PackedConfig:
        """How the experts are packed; InputError unless all are alike."""
        each = {n: PackedConfig.of(Checkpoint(f).config) for n, f in self.experts.items()}
        (first, packed), *rest = each.items()
        if packed is None:
            raise InputError(f"expected sparse experts, but nothing of {first} was pruned")
        for name, other in rest:
            if other is None or other.to_dict() != packed.to_dict():
                raise InputError(
                    f"expected experts that are packed alike, but {name} is not like {first}"
                )
        return packed

    @cached_property
    def head(self) -> str | None:
        """Name of the output head's module if it is routed."""
        if self.settings.head == "shared":
            return None
        architecture = Architecture(self.base.config)
        name = name_of(architecture.model, architecture.model.get_output_embeddings())
        if f"{name}.weight" in architecture.tied:
            raise InputError(
                "expected a head of its own for head: routed, but this base ties it to the "
                "embeddings; leave both in the shared part"
            )
        return name

    @cached_property
    def norms(self) -> set[str]:
        """Names of the norms' weights if those are routed."""
        if self.settings.norms == "shared":
            return set()
        model = Architecture(self.base.config).model
        prefix, blocks = decoder_blocks(model)
        width = width_of(model)
        inside = {
            f"{prefix}.{number}.{name}.weight"
            for number, block in enumerate(blocks)
            for name in norms_of(block, width)
        }
        return inside | {f"{name}.weight" for name in final_norms(model, prefix)}

    @cached_property
    def embedding(self) -> str | None:
        """Name of the embeddings' weight if they are routed."""
        if self.settings.embeddings == "shared":
            return None
        architecture = Architecture(self.base.config)
        model = architecture.model
        if architecture.tied:
            raise InputError(
                "expected embeddings of their own for embeddings: routed, but this base ties its "
                "head to them, which would stay as it is; leave both in the shared part"
            )
        return f"{name_of(model, model.get_input_embeddings())}.weight"

    def is_shared(self, name: str) -> bool:
        """Everything but the routed linears, which are the base's or nobody's."""
        module, _, _ = name.rpartition(".")
        routed = module in self.packing.modules or module == self.head
        return not routed and self.is_known(name)

    def twin(self, name: str | None) -> dict[str, Tensor]:
        """The shared part and one expert's own tensors, or the base's in their place."""
        found = {key: tensor.float() for key, tensor in self.shared_tensors.items()}
        source: Mapping[str, Tensor] = self.base if name is None else self.finetunes[name]
        found |= {key: source[key].float() for key in self._unpruned(source, of_expert=name)}
        if name is None:
            packed: Mapping[str, Tensor] = self.base
        elif self.pruned_from is None:
            packed = dense_view(self.experts[name])
        else:
            packed = dict(TaskVector(self.experts[name], self.base.folder).tensors())
        found |= {f"{m}.weight": packed[f"{m}.weight"].float() for m in self.packing.modules}
        if self.head and name is not None:
            found[f"{self.head}.weight"] = self._stored_head(name)
        return found

    def _stored_head(self, name: str) -> Tensor:
        """One expert's head, rounded as it is stored."""
        weight = f"{self.head}.weight"
        own_VD, kind = self.finetunes[name][weight].float(), self.packing.values or "fp32"
        if self.pruned_from is None:
            return own_VD.to(DTYPES[kind]).float()
        base_VD = self.base[weight].float()
        return base_VD + (own_VD - base_VD).to(DTYPES[kind]).float()

    def _unpruned(self, source: Mapping[str, Tensor], of_expert: str | None) -> list[str]:
        """Routed tensors that are whole: biases and head, and an expert's norms and embeddings."""
        names = {f"{module}.bias" for module in self.packing.modules}
        names |= {f"{self.head}.weight", f"{self.head}.bias"} if self.head else set()
        if of_expert is not None:
            names |= self.norms | ({self.embedding} if self.embedding else set())
        return sorted(names & set(source))

    def tensors(self) -> dict[str, Any]:
        """Where every tensor of every input went; what is routed is each expert's own."""
        linears = [*self.packing.modules, *([self.head] if self.head else [])]
        routed = {f"{module}.{end}" for module in linears for end in ("weight", "bias")}
        own = routed | self.norms | ({self.embedding} if self.embedding else set())

        def use(owner: str | None, name: str) -> Use:
            if not self.is_known(name):
                return "unknown"
            if owner is None and name in routed:
                return "used" if self.settings.base == "dense" else "superseded"
            return "used" if owner and name in own else self.use_of_shared(owner)

        return {
            "base": account(self.base, partial(use, None)),
            "experts": {n: account(ft, partial(use, n)) for n, ft in self.finetunes.items()},
        }

    def assemble(
        self,
        folder: Path,
        shared_part: Mapping[str, Tensor],
        gates: Mapping[str, Tensor] | None,
        *,
        dense: bool = False,
    ) -> None:
        """Write the routed model with these shared tensors and gates.

        Dense experts are held in the packed format too, with a mask that keeps everything.
        """
        packing = self._packing(dense=dense)
        write_weights(folder, self._tensors_of(shared_part, gates, packing, dense=dense))
        self._config(packing).save_pretrained(folder)
        write_shim(folder, RoutedConfig)
        self.tokenizer.save_pretrained(folder)
        if self.generation is not None:
            self.generation.save_pretrained(folder)

    def _packing(self, *, dense: bool) -> PackedConfig:
        modules = [*self.packing.modules, *([self.head] if self.head else [])]
        if dense:
            return PackedConfig(pattern="dense", modules=modules)
        if self.head and self.packing.values in LARGEST_CODE:
            raise InputError(
                f"expected floating-point values with head: routed, because a head is not "
                f"quantised, but prune.values is {self.packing.values}; use bf16"
            )
        own = {**self.packing.patterns, **({self.head: "dense"} if self.head else {})}
        values, pattern = self.packing.values, self.packing.pattern
        return PackedConfig(pattern=pattern, modules=modules, values=values, patterns=own)

    def layout(self) -> RoutedLayout:
        """What is routed."""
        return RoutedLayout(
            experts=self.recipe.names,
            architecture=self.base.config.model_type,
            base=self.settings.base == "dense",
            router=self.settings.spec(self.recipe.names, self.recipe.seed),
            routers=self.settings.routers,
            span=self.settings.layers_of(self.base.config.num_hidden_layers),
            norms=self.settings.norms == "routed",
            embeddings=self.settings.embeddings == "routed",
            head=self.settings.head == "routed",
        )

    def _config(self, packing: PackedConfig) -> Any:
        fields = {
            name: value
            for name, value in self.base.config.to_dict().items()
            if name not in ("model_type", "architectures", "quantization_config", "auto_map")
        }
        config = config_class(self.base.config.model_type)(**fields)
        config.architectures = ["RoutedForCausalLM"]
        config.moiety = self.layout().model_dump()
        config.quantization_config = packing
        return config

    def _tensors_of(
        self,
        shared_part: Mapping[str, Tensor],
        gates: Mapping[str, Tensor] | None,
        packing: PackedConfig,
        *,
        dense: bool,
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in shared_part.items():
            yield name, tensor
            if name in self.norms or name == self.embedding:
                yield self._owner(name) + ".experts", self._changes(name, tensor)
        for module in packing.modules:
            if self.settings.base == "dense":
                yield f"{module}.weight", self.base[f"{module}.weight"]
            yield from self._packed(module, packing, dense=dense)
            yield from self._biases(module)
        yield from (gates or self._zero_gates(packing)).items()

    def _owner(self, name: str) -> str:
        return name.rpartition(".")[0]

    def _changes(self, name: str, shared: Tensor) -> Tensor:
        """What every finetune has beyond the shared tensor, stacked."""
        each = [finetune[name].float() - shared.float() for finetune in self.finetunes.values()]
        return torch.stack(each).to(shared.dtype)

    def _packed(
        self, module: str, packing: PackedConfig, *, dense: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """The experts' matrices of one linear, stacked: values, masks and scales."""
        if dense or module == self.head:
            each = [self._whole(module, tune, packing) for tune in self.finetunes.values()]
        else:
            folders = [Checkpoint(folder) for folder in self.experts.values()]
            ends = [end for end in ENDS if f"{module}.weight{end}" in folders[0]]
            each = [{end: raw[f"{module}.weight{end}"] for end in ends} for raw in folders]
        for end in each[0]:
            yield f"{module}.experts{end}", torch.stack([tensors[end] for tensors in each])

    def _whole(
        self, module: str, finetune: Mapping[str, Tensor], packing: PackedConfig
    ) -> dict[str, Tensor]:
        weight_OI = finetune[f"{module}.weight"].float()
        if self.settings.base == "dense":
            weight_OI = weight_OI - self.base[f"{module}.weight"].float()
        packed = pack(weight_OI, Pattern.dense(), values=packing.values or "fp32")
        return {end: t for end in ENDS if (t := packed.tensors("w").get(f"w{end}")) is not None}

    def _biases(self, module: str) -> Iterator[tuple[str, Tensor]]:
        name = f"{module}.bias"
        if name not in self.base:
            return
        base_O = self.base[name]
        if self.settings.base == "dense":
            yield name, base_O
            yield f"{module}.experts_bias", self._changes(name, base_O)
        else:
            yield f"{module}.experts_bias", torch.stack([t[name] for t in self.finetunes.values()])

    def _zero_gates(self, packing: PackedConfig) -> dict[str, Tensor]:
        """Gates that prefer no expert, by the names of their tensors."""
        with torch.device("meta"):
            config = self._config(packing)
            model = model_class(type(config))(config)
        dtype = getattr(self.base.config, "dtype", None) or torch.float32
        found: dict[str, Tensor] = {}
        for name, router in model.named_modules():
            if isinstance(router, Router):
                for key, tensor in router.state_dict().items():
                    own = dtype if key == "weight" else tensor.dtype
                    found[f"{name}.{key}"] = torch.zeros(tensor.shape, dtype=own)
        return found
