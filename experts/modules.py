"""Modules that hold packed weights and call the sparse ops: drop-in for Linear and MoE experts.

Parameter names follow transformers: the kept values take the dense parameter's own name, the
mask is `<name>_mask` and the scales of integer values `<name>_scale`, so its checkpoint
conversions and sharding plans find them all.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

from moiety.errors import InputError
from moiety.experts import kernels, packing
from moiety.experts.kernels.reference import ACTIVATIONS
from moiety.experts.packing import LARGEST_CODE
from moiety.experts.pattern import Pattern


class _PackedModule(nn.Module):
    """Holds packed matrices, or stacks of them, under given names."""

    def __init__(self, pattern: Pattern, values: str | None) -> None:
        super().__init__()
        self.pattern = pattern
        self.values = values
        self.widths: dict[str, int] = {}

    def _empty(self, name: str, stack: tuple[int, ...], rows: int, in_features: int) -> None:
        """Parameters for a stack of matrices (rows, in_features), not yet filled."""
        self.widths[name] = in_features
        kept = packing.stored_shape(self.pattern, self.values, rows, in_features)
        dtype = packing.DTYPES[self.values or "bf16"]
        self._hold(name, torch.empty(*stack, *kept, dtype=dtype))
        mask = torch.zeros(*stack, rows, -(-in_features // 8), dtype=torch.uint8)
        self._hold(f"{name}_mask", mask)
        if self.values in LARGEST_CODE:
            scale = torch.empty(*stack, *packing.scale_shape(rows, in_features))
            self._hold(f"{name}_scale", scale.to(torch.bfloat16))
        else:
            self.register_parameter(f"{name}_scale", None)

    def _hold(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def packed(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """The values, mask and scales (None unless the values are integers) called `name`."""
        return getattr(self, name), getattr(self, f"{name}_mask"), getattr(self, f"{name}_scale")

    @property
    def packed_names(self) -> list[str]:
        """Names of every parameter that belongs to a packed matrix."""
        own = {f"{name}{suffix}" for name in self.widths for suffix in ("", "_mask", "_scale")}
        return [name for name, _ in self.named_parameters() if name in own]

    def check(self, name: str) -> None:
        """Raise InputError that names the tensor unless every matrix is validly packed.

        What was offloaded to disk (meta device) is not read back for this.
        """
        for attribute, width in self.widths.items():
            values, mask, scale = self.packed(attribute)
            if not values.is_meta:
                full_name = f"{name}.{attribute}"
                packing.check(full_name, values, mask, width, self.pattern, scale, self.values)

    def _stored_as(self) -> str:
        return f"{self.pattern}" if self.values is None else f"{self.pattern}, {self.values}"


class SparseLinear(_PackedModule):
    """A linear layer whose weight stays packed.

    `weight` (O, K) or flat, `weight_mask` (O, B) and, for integer values, `weight_scale` (O, G).
    `values` None stands for whichever floating-point type is loaded.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: Pattern,
        values: str | None = None,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__(pattern, values)
        self.in_features = in_features
        self.out_features = out_features
        self._empty("weight", (), out_features, in_features)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weightᵀ + bias`, (..., I) to (..., O)."""
        values, mask_OB, scale_OG = self.packed("weight")
        output = kernels.sparse_linear(input, values, mask_OB, self.in_features, scale_OG)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        """Sizes, pattern and kind of values, shown by print(model)."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._stored_as()}"


def _sparse_forward(
    module: "SparseExperts", hidden_TD: Tensor, experts_TA: Tensor, weights_TA: Tensor
) -> Tensor:
    gate_up_values, gate_up_mask, gate_up_scale = module.packed("gate_up_proj")
    down_values, down_mask, down_scale = module.packed("down_proj")
    return kernels.sparse_experts(
        hidden_TD,
        gate_up_values,
        gate_up_mask,
        down_values,
        down_mask,
        experts_TA,
        weights_TA,
        module.activation,
        gate_up_scale,
        down_scale,
    )


class SparseInterface(ExpertsInterface):
    """The names transformers switches between (prefill, decode), all served by our op."""

    _global_mapping = {"grouped_mm": _sparse_forward, "batched_mm": _sparse_forward}  # noqa: RUF012


class SparseExperts(_PackedModule):
    """All experts of one routed block, packed; takes the place of a stock `*Experts` module.

    `gate_up_proj` (E, 2F, K) or flat (E, n), gate rows before up rows; `down_proj` (E, D, K') or
    (E, n'); masks (E, rows, B); scales (E, rows, G) for integer values. E experts, D model
    width, F expert width. InputError when a flat int4 gate would end in the middle of a byte.
    """

    def __init__(
        self, config: Any, stock: nn.Module, pattern: Pattern, values: str | None = None
    ) -> None:
        super().__init__(pattern, values)
        gate_up, down = stock.get_parameter("gate_up_proj"), stock.get_parameter("down_proj")
        self.num_experts, rows, self.hidden_dim = gate_up.shape
        self.intermediate_dim = down.shape[-1]
        self.activation = activation_name(config)
        check_fusable(pattern, values, self.intermediate_dim, self.hidden_dim)
        self._empty("gate_up_proj", (self.num_experts,), rows, self.hidden_dim)
        self._empty("down_proj", (self.num_experts,), self.hidden_dim, self.intermediate_dim)

    def forward(self, hidden_TD: Tensor, experts_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """Weighted sum of each token's experts (T, D)."""
        return _sparse_forward(self, hidden_TD, experts_TA, weights_TA)

    def extra_repr(self) -> str:
        """Sizes, pattern and kind of values, shown by print(model)."""
        return (
            f"experts={self.num_experts}, width={self.hidden_dim}, "
            f"expert_width={self.intermediate_dim}, {self._stored_as()}"
        )


use_experts_implementation(SparseExperts, experts_interface=SparseInterface())


def check_fusable(pattern: Pattern, values: str | None, rows: int, in_features: int) -> None:
    """Raise InputError unless a packed gate (rows, in_features) can stand before its up matrix."""
    kept = pattern.values_shape(rows, in_features)
    if values == "int4" and len(kept) == 1 and kept[0] % 2:
        raise InputError(
            f"expected an even number of kept values in every expert's gate matrix, so that int4 "
            f"ones fill whole bytes, but pattern {pattern} keeps {kept[0]} of ({rows}, "
            f"{in_features}); choose another density or int8"
        )


def activation_name(config: Any) -> str:
    """The experts' activation in a transformers configuration; ValueError if we have none such."""
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "silu")
    if name not in ACTIVATIONS:
        raise ValueError(f"expected an activation in {ACTIVATIONS}, but the model uses {name!r}")
    return name
