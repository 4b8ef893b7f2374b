"""moiety as a transformers quantization method: packed checkpoints open like any other.

Importing this module registers the method `moiety` (design: packed format, version 1), which
`AutoModelForCausalLM.from_pretrained` then finds by the `quantization_config` of a checkpoint.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from moiety.errors import InputError
from moiety.experts.modules import SparseExperts, SparseLinear
from moiety.experts.packing import VERSION
from moiety.experts.pattern import Pattern

METHOD = "moiety"


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint: format version, pattern, packed modules.

    `modules` are full module names: linear layers of a dense architecture, or the experts
    module of each routed block.
    """

    def __init__(
        self, *, pattern: str, modules: list[str], version: int = VERSION, **kwargs: Any
    ) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.version = version
        self.pattern = pattern
        self.modules = list(modules)
        if version != VERSION:
            raise InputError(
                f"expected packed format version {VERSION}, but the checkpoint has {version}; "
                "install the moiety release that wrote it"
            )
        Pattern.parse(pattern)

    def to_dict(self) -> dict[str, Any]:
        """The entry in config.json."""
        return {
            "quant_method": METHOD,
            "version": self.version,
            "pattern": self.pattern,
            "modules": self.modules,
        }


class PackedQuantizer(HfQuantizer):
    """Puts sparse modules where the checkpoint is packed, and refuses anything it cannot trust."""

    serialized_names = {  # noqa: RUF012
        "weight": ["weight", "weight_mask"]
    }
    quantization_config: PackedConfig

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Packed values are frozen."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The sparse ops have fake kernels."""
        return True

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`save_pretrained` writes the packed format again."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to pack on the fly: pruning needs calibration text."""
        if not self.pre_quantized:
            raise InputError(
                "expected a packed checkpoint, but this one is dense; "
                "make a packed one with `moiety prune` or moiety.experts.prune"
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """Packed values keep their stored dtype; everything else follows the requested one."""
        targets = getattr(converter, "target_patterns", [])
        if any(self._is_packed(str(target)) for target in targets):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _is_packed(self, target: str) -> bool:
        parent = target.removesuffix("_mask").rpartition(".")[0]
        return any(parent == name or name.endswith(parent) for name in self._packed_names)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        pattern = Pattern.parse(self.quantization_config.pattern)
        self._packed_names = list(self.quantization_config.modules)
        for name in self._packed_names:
            replace_with_sparse(model, name, pattern)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        check_complete(model)
        for name in self.quantization_config.modules:
            module = model.get_submodule(name)
            module.requires_grad_(False)
            if isinstance(module, SparseLinear | SparseExperts):
                module.check(name)
        return model


def replace_with_sparse(model: nn.Module, name: str, pattern: Pattern) -> None:
    """Put an empty sparse module (meta device) in the place of the stock one called `name`."""
    try:
        parent, attribute = get_module_from_name(model, name)
        stock = getattr(parent, attribute)
    except AttributeError as error:
        raise InputError(
            f"expected a module {name}, as the checkpoint's quantization_config says, "
            f"but {type(model).__name__} has none"
        ) from error
    with torch.device("meta"):
        if isinstance(stock, nn.Linear):
            sparse: nn.Module = SparseLinear(
                stock.in_features, stock.out_features, pattern, bias=stock.bias is not None
            )
        elif hasattr(stock, "gate_up_proj") and hasattr(stock, "down_proj"):
            sparse = SparseExperts(cast(Any, model.config), stock, pattern)
        else:
            raise InputError(
                f"expected {name} to be a linear layer or a gated experts module, "
                f"but it is a {type(stock).__name__}"
            )
    setattr(parent, attribute, sparse)


def check_complete(model: nn.Module) -> None:
    """Raise InputError if any weight was absent from the files (transformers only warns)."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [
        name
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "_is_hf_initialized", False) and name not in tied
    ]
    if missing:
        raise InputError(
            f"expected every weight in the checkpoint, but {len(missing)} are missing, "
            f"first {missing[0]}; the files are incomplete"
        )


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(PackedConfig)
    register_quantizer(METHOD)(PackedQuantizer)
