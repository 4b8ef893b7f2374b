"""Modules that hold packed weights and call the sparse ops: drop-in for Linear and MoE experts.

Parameter names follow transformers: the kept values take the dense parameter's own name, the
mask is `<name>_mask`, so its checkpoint conversions and sharding plans find both.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

from moiety.experts import kernels, packing
from moiety.experts.kernels.reference import ACTIVATIONS
from moiety.experts.pattern import Pattern


def _empty_packed(
    rows: tuple[int, ...], in_features: int, pattern: Pattern, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter]:
    values = torch.empty(*rows, pattern.kept_columns(in_features), dtype=dtype)
    mask = torch.zeros(*rows, -(-in_features // 8), dtype=torch.uint8)
    return nn.Parameter(values, requires_grad=False), nn.Parameter(mask, requires_grad=False)


class SparseLinear(nn.Module):
    """A linear layer whose weight stays packed: `weight` (O, K) and `weight_mask` (O, B)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: Pattern,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.pattern = pattern
        self.weight, self.weight_mask = _empty_packed((out_features,), in_features, pattern, dtype)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weightᵀ + bias`, (..., I) to (..., O)."""
        output = kernels.sparse_linear(input, self.weight, self.weight_mask, self.in_features)
        return output if self.bias is None else output + self.bias

    def check(self, name: str) -> None:
        """Raise InputError that names the tensor unless the weight is validly packed."""
        packing.check(
            f"{name}.weight", self.weight, self.weight_mask, self.in_features, self.pattern
        )

    def extra_repr(self) -> str:
        """Sizes and pattern, shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.pattern}"


def _sparse_forward(
    module: "SparseExperts", hidden_TD: Tensor, experts_TA: Tensor, weights_TA: Tensor
) -> Tensor:
    return kernels.sparse_experts(
        hidden_TD,
        module.gate_up_proj,
        module.gate_up_proj_mask,
        module.down_proj,
        module.down_proj_mask,
        experts_TA,
        weights_TA,
        module.activation,
    )


class SparseInterface(ExpertsInterface):
    """The names transformers switches between (prefill, decode), all served by our op."""

    _global_mapping = {"grouped_mm": _sparse_forward, "batched_mm": _sparse_forward}  # noqa: RUF012


class SparseExperts(nn.Module):
    """All experts of one routed block, packed; takes the place of a stock `*Experts` module.

    `gate_up_proj` (E, 2F, K) with `gate_up_proj_mask` (E, 2F, B), `down_proj` (E, D, K') with
    `down_proj_mask` (E, D, B'). E experts, D model width, F expert width.
    """

    def __init__(
        self,
        config: Any,
        stock: nn.Module,
        pattern: Pattern,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        gate_up, down = stock.get_parameter("gate_up_proj"), stock.get_parameter("down_proj")
        self.num_experts, rows, self.hidden_dim = gate_up.shape
        self.intermediate_dim = down.shape[-1]
        self.pattern = pattern
        self.activation = activation_name(config)
        self.gate_up_proj, self.gate_up_proj_mask = _empty_packed(
            (self.num_experts, rows), self.hidden_dim, pattern, dtype
        )
        self.down_proj, self.down_proj_mask = _empty_packed(
            (self.num_experts, self.hidden_dim), self.intermediate_dim, pattern, dtype
        )

    def forward(self, hidden_TD: Tensor, experts_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """Weighted sum of each token's experts (T, D)."""
        return _sparse_forward(self, hidden_TD, experts_TA, weights_TA)

    def check(self, name: str) -> None:
        """Raise InputError that names the tensor unless every expert is validly packed."""
        for attribute, width in (
            ("gate_up_proj", self.hidden_dim),
            ("down_proj", self.intermediate_dim),
        ):
            values, mask = getattr(self, attribute), getattr(self, f"{attribute}_mask")
            packing.check(f"{name}.{attribute}", values, mask, width, self.pattern)

    def extra_repr(self) -> str:
        """Sizes and pattern, shown by print(model)."""
        return (
            f"experts={self.num_experts}, width={self.hidden_dim}, "
            f"expert_width={self.intermediate_dim}, {self.pattern}"
        )


use_experts_implementation(SparseExperts, experts_interface=SparseInterface())


def activation_name(config: Any) -> str:
    """The experts' activation in a transformers configuration; ValueError if we have none such."""
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "silu")
    if name not in ACTIVATIONS:
        raise ValueError(f"expected an activation in {ACTIVATIONS}, but the model uses {name!r}")
    return name
