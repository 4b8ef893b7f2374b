"""The public sparse ops, registered with torch.library so that autograd and compilers see them.

T tokens, D model width, F expert width, E experts, A active experts, O/I out/in features,
K kept values a row, B mask bytes a row. `reference.py` specifies what each op computes.
"""

import torch
from torch import Tensor

from moiety.experts.kernels import reference

__all__ = ["sparse_experts", "sparse_linear"]


def sparse_linear(input: Tensor, values_OK: Tensor, mask_OB: Tensor, in_features: int) -> Tensor:
    """`input @ weightᵀ` (..., O) for a packed weight; differentiable in `input` (..., I).

    Raises ValueError when the shapes or dtypes do not fit each other.
    """
    _check_packed("weight", values_OK, mask_OB, in_features)
    _check_width("input", input, in_features)
    flat_TI = input.reshape(-1, in_features)
    output_TO = torch.ops.moiety.sparse_linear(flat_TI, values_OK, mask_OB, in_features)
    return output_TO.reshape(*input.shape[:-1], values_OK.shape[0])


def sparse_experts(
    hidden_TD: Tensor,
    gate_up_values: Tensor,
    gate_up_mask: Tensor,
    down_values: Tensor,
    down_mask: Tensor,
    experts_TA: Tensor,
    weights_TA: Tensor,
    activation: str = "silu",
) -> Tensor:
    """A whole routed block of gated experts (T, D); differentiable in hidden and weights.

    `gate_up_values` (E, 2F, K), `gate_up_mask` (E, 2F, B), `down_values` (E, D, K'),
    `down_mask` (E, D, B'). Raises ValueError when shapes, dtypes or the activation do not fit.
    """
    width = gate_up_values.shape[1] // 2
    _check_width("hidden", hidden_TD, down_values.shape[1])
    _check_packed("gate_up", gate_up_values, gate_up_mask, hidden_TD.shape[1])
    _check_packed("down", down_values, down_mask, width)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {reference.ACTIVATIONS}, but it is {activation!r}"
        )
    if experts_TA.shape != weights_TA.shape or experts_TA.shape[:1] != hidden_TD.shape[:1]:
        raise ValueError(
            f"experts and weights must be (tokens, active) with {hidden_TD.shape[0]} tokens, "
            f"but they are {tuple(experts_TA.shape)} and {tuple(weights_TA.shape)}"
        )
    return torch.ops.moiety.sparse_experts(
        hidden_TD,
        gate_up_values,
        gate_up_mask,
        down_values,
        down_mask,
        experts_TA,
        weights_TA,
        activation,
    )


def _check_packed(name: str, values: Tensor, mask: Tensor, in_features: int) -> None:
    if not values.is_floating_point() or mask.dtype != torch.uint8:
        raise ValueError(
            f"{name} must be packed as floating-point values and a uint8 mask, "
            f"but they are {values.dtype} and {mask.dtype}"
        )
    expected = (*values.shape[:-1], -(-in_features // 8))
    if tuple(mask.shape) != expected or values.shape[-1] > in_features:
        raise ValueError(
            f"{name} with values of shape {tuple(values.shape)} and {in_features} input columns "
            f"needs a mask of shape {expected}, but it has {tuple(mask.shape)}"
        )


def _check_width(name: str, tensor: Tensor, width: int) -> None:
    if tensor.shape[-1] != width or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point tensor of width {width}, "
            f"but it is {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


_linear = torch.library.custom_op("moiety::sparse_linear", reference.sparse_linear, mutates_args=())


@_linear.register_fake
def _(input_TI: Tensor, values_OK: Tensor, mask_OB: Tensor, in_features: int) -> Tensor:
    return input_TI.new_empty(input_TI.shape[0], values_OK.shape[0])


_linear_backward = torch.library.custom_op(
    "moiety::sparse_linear_backward", reference.sparse_linear_backward, mutates_args=()
)


@_linear_backward.register_fake
def _(gradient_TO: Tensor, values_OK: Tensor, mask_OB: Tensor, in_features: int) -> Tensor:
    return gradient_TO.new_empty(gradient_TO.shape[0], in_features)


def _linear_save(ctx, inputs, output) -> None:
    _input, values_OK, mask_OB, in_features = inputs
    ctx.save_for_backward(values_OK, mask_OB)
    ctx.in_features = in_features


def _linear_gradient(ctx, gradient_TO):
    values_OK, mask_OB = ctx.saved_tensors
    gradient_TI = torch.ops.moiety.sparse_linear_backward(
        gradient_TO, values_OK, mask_OB, ctx.in_features
    )
    return gradient_TI, None, None, None


_linear.register_autograd(_linear_gradient, setup_context=_linear_save)


_experts = torch.library.custom_op(
    "moiety::sparse_experts", reference.sparse_experts, mutates_args=()
)


@_experts.register_fake
def _(hidden_TD: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(hidden_TD)


_experts_backward = torch.library.custom_op(
    "moiety::sparse_experts_backward", reference.sparse_experts_backward, mutates_args=()
)


@_experts_backward.register_fake
def _(gradient_TD: Tensor, hidden_TD: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_TD), torch.empty_like(rest[5])


def _experts_save(ctx, inputs, output) -> None:
    *tensors, activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.activation = activation


def _experts_gradient(ctx, gradient_TD):
    d_hidden_TD, d_weights_TA = torch.ops.moiety.sparse_experts_backward(
        gradient_TD.contiguous(), *ctx.saved_tensors, ctx.activation
    )
    return d_hidden_TD, None, None, None, None, None, d_weights_TA, None


_experts.register_autograd(_experts_gradient, setup_context=_experts_save)
