"""What a stock model of some configuration stores: every weight's name on disk and its shape.

transformers' own conversions say how a module in memory is spelled on disk (for instance
Mixtral's fused experts as `experts.3.w1.weight`), so this holds for every architecture it knows.
"""

import copy
import functools
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moiety.errors import InputError

Shapes = dict[str, tuple[int, ...]]


class Architecture:
    """The stock, dense model of a configuration, without any weights."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = dense_config(config)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model on the meta device; InputError when transformers knows none."""
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(self.config)
        except (ValueError, KeyError) as error:
            raise InputError(
                f"expected a causal language model that transformers knows, but: {error}"
            ) from error

    @functools.cached_property
    def shapes(self) -> Shapes:
        """Shape of every stored tensor by its name on disk; tied ones are stored once."""
        return self._stored([name for name in self.model.state_dict() if name not in self.tied])

    @functools.cached_property
    def tied(self) -> set[str]:
        """Names of tensors that a checkpoint need not hold, because others stand for them."""
        return set(self.model.all_tied_weights_keys or {})

    @property
    def packable(self) -> list[str]:
        """Names of the modules that can be packed: linear layers, and experts held as one."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
            or {"gate_up_proj", "down_proj"} <= dict(module.named_parameters(recurse=False)).keys()
        ]

    def matrices(self, module: str) -> Shapes:
        """Shape of every weight matrix of one module by its name on disk.

        Raises InputError when the model has no such module or it holds no matrices.
        """
        try:
            parts = self.model.get_submodule(module)
        except AttributeError as error:
            raise InputError(
                f"expected a module {module}, but {type(self.model).__name__} has none"
            ) from error
        names = [f"{module}.{name}" for name, _ in parts.named_parameters()]
        found = {name: shape for name, shape in self._stored(names).items() if len(shape) > 1}
        if not found:
            raise InputError(f"expected {module} to hold weight matrices, but it holds none")
        return found

    def _stored(self, names: Sequence[str]) -> Shapes:
        state = self.model.state_dict()
        stored = revert_weight_conversion(self.model, {name: state[name] for name in names})
        return {name: tuple(tensor.shape) for name, tensor in stored.items()}


def dense_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a configuration that says nothing of packing or quantization."""
    dense = copy.deepcopy(config)
    vars(dense).pop("quantization_config", None)
    return dense
