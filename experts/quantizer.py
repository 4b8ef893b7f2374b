"""moiety as a transformers quantization method: packed checkpoints open like any other.

Importing this module registers the method `moiety` (design: packed format, version 1), which
`AutoModelForCausalLM.from_pretrained` then finds by the `quantization_config` of a checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from moiety.errors import InputError
from moiety.experts.dense import read_fast
from moiety.experts.modules import PackedModule, SparseExperts, SparseLinear
from moiety.experts.packing import VALUES, VERSION
from moiety.experts.pattern import Pattern

METHOD = "moiety"


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint: which modules are packed and how.

    `modules` are full module names: linear layers of a dense architecture, or the experts module
    of each routed block. `pattern` is theirs, except where `patterns` names another one;
    `values` is one of packing.VALUES, or None for floating-point ones as they are stored.
    Raises InputError when something is missing, unknown or of another version.
    """

    def __init__(
        self,
        *,
        pattern: str = "",
        modules: Sequence[str] = (),
        version: int = VERSION,
        values: str | None = None,
        patterns: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_fields(pattern, modules, version, values, patterns)
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.version = version
        self.pattern = pattern
        self.modules = list(modules)
        self.values = values
        self.patterns = dict(patterns or {})

    def pattern_of(self, module: str) -> Pattern:
        """The pattern of one packed module."""
        return Pattern.parse(self.patterns.get(module, self.pattern))

    def to_dict(self) -> dict[str, Any]:
        """The entry in config.json."""
        fields: dict[str, Any] = {
            "quant_method": METHOD,
            "version": self.version,
            "pattern": self.pattern,
            "modules": self.modules,
        }
        optional = {"values": self.values, "patterns": self.patterns}
        return fields | {name: value for name, value in optional.items() if value}

    @classmethod
    def of(cls, config: PretrainedConfig) -> "PackedConfig | None":
        """The packing that a model's configuration states, None for a dense model.

        Raises InputError when the model is quantized in another way.
        """
        stated = getattr(config, "quantization_config", None)
        if stated is None or isinstance(stated, cls):
            return stated
        fields = dict(stated) if isinstance(stated, Mapping) else stated.to_dict()
        method = fields.pop("quant_method", None)
        if method != METHOD:
            raise InputError(
                f"expected a dense model or one packed by moiety, but its quantization method is "
                f"{method!r}; give the unquantized model"
            )
        return cls(**fields)


def _check_fields(pattern: Any, modules: Any, version: Any, values: Any, patterns: Any) -> None:
    if version != VERSION:
        raise InputError(
            f"expected packed format version {VERSION}, but the checkpoint has {version}; "
            "install the moiety release that wrote it"
        )
    listed = isinstance(modules, Sequence) and not isinstance(modules, str)
    if not listed or not all(isinstance(name, str) for name in modules):
        raise InputError(
            f"quantization_config.modules must be a list of names, but it is {modules!r}"
        )
    if values is not None and values not in VALUES:
        raise InputError(
            f"quantization_config.values must be one of {', '.join(VALUES)}, but it is {values!r}"
        )
    if patterns is not None and not isinstance(patterns, Mapping):
        raise InputError(
            f"quantization_config.patterns must map modules to patterns, but it is {patterns!r}"
        )
    strange = sorted(set(patterns or {}) - set(modules))
    if strange:
        raise InputError(
            f"quantization_config.patterns names {strange[0]}, which is not among its modules"
        )
    for text in (pattern, *(patterns or {}).values()):
        if not isinstance(text, str):
            raise InputError(
                f"quantization_config: pattern must be text such as 2:4, but it is {text!r}"
            )
        Pattern.parse(text)


class PackedQuantizer(HfQuantizer):
    """Puts sparse modules where the checkpoint is packed, and refuses anything it cannot trust."""

    serialized_names = {  # noqa: RUF012
        "weight": ["weight", "weight_mask", "weight_scale"]
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
        """Packed values and scales keep their stored dtype; everything else follows `dtype`."""
        targets = [str(target) for target in getattr(converter, "target_patterns", [])]
        if any(self._is_packed(target) for target in targets):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """As transformers does, and where a weight is only renamed its mask and scales follow."""
        updated = super().update_weight_conversions(weight_conversions, model)
        renamed = [one for one in weight_conversions if isinstance(one, WeightRenaming)]
        pairs = {
            source: rename.target_patterns[0]
            for rename in renamed
            for source in rename.source_patterns
        }
        followers = [
            WeightRenaming(source + end, target + end)
            for source, target in pairs.items()
            for end in ("_mask", "_scale")
            if source.endswith("weight") and self._is_packed(f".{target}{end}")
        ]
        return [*followers, *updated]

    def _is_packed(self, target: str) -> bool:
        """Whether a parameter's name, or its end where it begins with a dot, is a packed one."""
        if target.startswith("."):
            return any(name.endswith(target) for name in self._packed_parameters)
        return target in self._packed_parameters

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        base = (getattr(model.config, "moiety", None) or {}).get("task_vector_of")
        if base is not None:
            raise InputError(
                f"expected whole weights, but these are differences to a base ({base}); "
                "open them with moiety.experts.open_delta"
            )
        config = self.quantization_config
        self._packed_parameters: set[str] = set()
        for name in config.modules:
            sparse = replace_with_sparse(model, name, config.pattern_of(name), config.values)
            self._packed_parameters |= {f"{name}.{part}" for part in sparse.packed_names}

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        check_complete(model)
        for name in self.quantization_config.modules:
            module = model.get_submodule(name)
            module.requires_grad_(False)
            if isinstance(module, PackedModule):
                module.check(name)
                module.prepare()
        read_fast(model)
        return model


def replace_with_sparse(
    model: nn.Module, name: str, pattern: Pattern, values: str | None = None
) -> PackedModule:
    """Put an empty sparse module (meta device) in the place of the stock one called `name`.

    A module that is packed already stays: our own model classes make theirs themselves. Raises
    InputError when there is no such module or it cannot be packed so.
    """
    try:
        parent, attribute = get_module_from_name(model, name)
        stock = getattr(parent, attribute)
    except AttributeError as error:
        raise InputError(
            f"expected a module {name}, as the checkpoint's quantization_config says, "
            f"but {type(model).__name__} has none"
        ) from error
    if isinstance(stock, PackedModule):
        return stock
    try:
        with torch.device("meta"):
            sparse = _sparse_like(stock, model, pattern, values)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    setattr(parent, attribute, sparse)
    return sparse


def _sparse_like(
    stock: nn.Module, model: nn.Module, pattern: Pattern, values: str | None
) -> SparseLinear | SparseExperts:
    if isinstance(stock, nn.Linear):
        bias = stock.bias is not None
        return SparseLinear(stock.in_features, stock.out_features, pattern, values, bias=bias)
    if hasattr(stock, "gate_up_proj") and hasattr(stock, "down_proj"):
        return SparseExperts(cast(Any, model.config), stock, pattern, values)
    raise InputError(
        f"expected a linear layer or a gated experts module, but it is a {type(stock).__name__}"
    )


def check_complete(model: nn.Module) -> None:
    """Raise InputError if any weight was absent from the files (transformers only warns).

    Weights still on the meta device were found and offloaded to disk.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [
        name
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "_is_hf_initialized", False)
        and not parameter.is_meta
        and name not in tied
    ]
    if missing:
        raise InputError(
            f"expected every weight in the checkpoint, but {len(missing)} are missing, "
            f"first {missing[0]}; the files are incomplete"
        )


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(PackedConfig)
    register_quantizer(METHOD)(PackedQuantizer)
