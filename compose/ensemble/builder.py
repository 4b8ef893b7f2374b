"""Build an ensemble: every sparse finetune whole, side by side in one checkpoint."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from moiety.compose.account import Use, account
from moiety.compose.builder import Builder
from moiety.compose.ensemble.config import EnsembleConfig, full_prior
from moiety.compose.merge import everything
from moiety.compose.recipe import Ensemble
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.quantizer import PackedConfig
from moiety.experts.shards import write_weights

OWN_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "moiety",
        "pad_token_id",
        "quantization_config",
        "transformers_version",
        "use_cache",
    }
)
"""In which finetunes may differ: nothing that changes what they compute at inference."""


class EnsembleBuilder(Builder):
    """Stages of an ensemble: the finetunes are pruned, nothing is trained."""

    @property
    def settings(self) -> Ensemble:
        """The recipe's section `compose`."""
        assert isinstance(self.recipe.compose, Ensemble)
        return self.recipe.compose

    @cached_property
    def prior(self) -> dict[str, float]:
        """Every expert's share before any token is seen."""
        return full_prior(self.recipe.names, self.settings.prior)

    @cached_property
    def architecture(self) -> PretrainedConfig:
        """The configuration that all finetunes have."""
        return common_config({n: finetune.config for n, finetune in self.finetunes.items()})

    def write(self, folder: Path, *, dense: bool = False) -> None:
        """Run what is not done yet and write the ensemble into an empty folder.

        `dense`: of the unpruned finetunes (a control). Raises InputError, before anything is
        pruned, when the finetunes differ in their architecture or the prior names other experts.
        """
        prior, architecture = self.prior, self.architecture
        parts = self.finetunes if dense else self._packed
        packing = None if dense else packed_ensemble(self._packings)
        config = ensemble_config(architecture, self.recipe.names, prior, packing)
        write_weights(folder, ensemble_tensors(parts, self.is_known))
        config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.generation is not None:
            self.generation.save_pretrained(folder)

    def facts(self) -> dict[str, Any]:
        """The experts and their prior; nothing is trained."""
        return {"experts": self.recipe.names, "prior": self.prior, "trained_parameters": 0}

    def tensors(self) -> dict[str, Any]:
        """Where every tensor of every input went: finetunes are whole, nothing is the base's."""

        def use(own: Use, name: str) -> Use:
            return own if self.is_known(name) else "unknown"

        each = {n: account(ft, partial(use, "used")) for n, ft in self.finetunes.items()}
        return {"base": account(self.base, partial(use, "superseded")), "experts": each}

    @property
    def _packed(self) -> dict[str, Checkpoint]:
        return {name: Checkpoint(folder) for name, folder in self.experts.items()}

    @property
    def _packings(self) -> dict[str, PackedConfig | None]:
        return {name: PackedConfig.of(c.config) for name, c in self._packed.items()}


def common_config(configs: Mapping[str, PretrainedConfig]) -> PretrainedConfig:
    """The one configuration of all finetunes, in the widest of their dtypes.

    Raises InputError that names a field in which two differ and that changes what they compute.
    """
    (first, ours), *others = configs.items()
    for name, theirs in others:
        here, there = _relevant(ours), _relevant(theirs)
        for field in sorted(here.keys() | there.keys()):
            if here.get(field) != there.get(field):
                raise InputError(
                    f"expected experts of one architecture, but {field} is {here.get(field)!r} "
                    f"for {first} and {there.get(field)!r} for {name}; give finetunes of one base"
                )
    fields = ours.to_dict()
    for field in ("_name_or_path", "moiety", "quantization_config"):
        fields.pop(field, None)
    dtypes = [c.dtype for c in configs.values() if isinstance(c.dtype, torch.dtype)]
    fields["dtype"] = reduce(torch.promote_types, dtypes) if dtypes else None
    return type(ours)(**fields)


def _relevant(config: PretrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in OWN_FIELDS}


def ensemble_config(
    architecture: PretrainedConfig,
    experts: list[str],
    prior: Mapping[str, float],
    packing: PackedConfig | None,
) -> EnsembleConfig:
    """The configuration of an ensemble of `experts` in this order; no `packing`: dense ones."""
    config = EnsembleConfig(
        text_config=architecture,
        moiety={"experts": list(experts)},
        prior=dict(prior),
        dtype=architecture.dtype,
        architectures=["EnsembleForCausalLM"],
    )
    if packing is not None:
        config.quantization_config = packing
    return config


def packed_ensemble(experts: Mapping[str, PackedConfig | None]) -> PackedConfig | None:
    """How an ensemble is packed, from how each expert is, in order; None: not at all.

    Raises InputError when two experts store different kinds of values.
    """
    packings = {name: packed for name, packed in experts.items() if packed is not None}
    kinds = {name: packed.values for name, packed in packings.items()}
    if len(set(kinds.values())) > 1:
        raise InputError(f"expected one kind of values in all experts, but they have {kinds}")
    patterns = {
        f"experts.{index}.{module}": str(packed.pattern_of(module))
        for index, packed in enumerate(experts.values())
        if packed is not None
        for module in packed.modules
    }
    if not patterns:
        return None
    [(usual, _)] = Counter(patterns.values()).most_common(1)
    own = {module: pattern for module, pattern in patterns.items() if pattern != usual}
    [values] = set(kinds.values())
    return PackedConfig(pattern=usual, modules=list(patterns), values=values, patterns=own)


def ensemble_tensors(
    experts: Mapping[str, Mapping[str, Tensor]], keep: Callable[[str], bool] = everything
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that `keep` accepts of every expert in turn, under its name in the ensemble."""
    for index, tensors in enumerate(experts.values()):
        for name in filter(keep, tensors):
            yield f"experts.{index}.{name}", tensors[name]
