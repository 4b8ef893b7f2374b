"""The public sparse ops, registered with torch.library so that autograd and compilers see them.

`reference.py` specifies what each op computes and how a packed matrix is laid out.

T tokens, D model width, F expert width, E experts, A active experts, O/I out/in features,
K kept values a row, B mask bytes a row, G scales a row.
"""

import torch
from torch import Tensor

from moiety.experts.kernels import reference

__all__ = ["sparse_experts", "sparse_linear"]


def sparse_linear(
    input: Tensor,
    values: Tensor,
    mask_OB: Tensor,
    in_features: int,
    scale_OG: Tensor | None = None,
) -> Tensor:
    """`input @ weightᵀ` (..., O) for a packed weight; differentiable in `input` (..., I).

    `values` are (O, K) or flat; integers need `scale_OG` (bf16). Raises ValueError when the
    shapes or dtypes do not fit each other.
    """
    _check_packed("weight", values, mask_OB, in_features, scale_OG, dims=2)
    _check_width("input", input, in_features)
    flat_TI = input.reshape(-1, in_features)
    output_TO = torch.ops.moiety.sparse_linear(flat_TI, values, mask_OB, in_features, scale_OG)
    return output_TO.reshape(*input.shape[:-1], mask_OB.shape[0])


def sparse_experts(
    hidden_TD: Tensor,
    gate_up_values: Tensor,
    gate_up_mask: Tensor,
    down_values: Tensor,
    down_mask: Tensor,
    experts_TA: Tensor,
    weights_TA: Tensor,
    activation: str = "silu",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """A whole routed block of gated experts (T, D); differentiable in hidden and weights.

    `gate_up_values` (E, 2F, K) or flat (E, n), `gate_up_mask` (E, 2F, B), `down_values`
    (E, D, K') or (E, n'), `down_mask` (E, D, B'); integers need `gate_up_scale` (E, 2F, G) and
    `down_scale` (E, D, G'). Raises ValueError when shapes, dtypes or the activation do not fit.
    """
    _check_packed("gate_up", gate_up_values, gate_up_mask, hidden_TD.shape[-1], gate_up_scale, 3)
    _check_packed("down", down_values, down_mask, gate_up_mask.shape[1] // 2, down_scale, 3)
    _check_width("hidden", hidden_TD, down_mask.shape[1])
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
        gate_up_scale,
        down_scale,
    )


def _check_packed(
    name: str,
    values: Tensor,
    mask: Tensor,
    in_features: int,
    scale: Tensor | None,
    dims: int,
) -> None:
    integers = values.dtype in (torch.int8, torch.uint8)
    if not (values.is_floating_point() or integers) or mask.dtype != torch.uint8:
        raise ValueError(
            f"{name} must be packed as floating-point, int8 or uint8 (two int4) values and a "
            f"uint8 mask, but they are {values.dtype} and {mask.dtype}"
        )
    if mask.dim() != dims or mask.shape[-1] != -(-in_features // 8):
        raise ValueError(
            f"{name} with {in_features} input columns needs a mask with {dims} dimensions and "
            f"{-(-in_features // 8)} bytes a row, but its shape is {tuple(mask.shape)}"
        )
    rows, flat = mask.shape[:-1], values.dim() == dims - 1
    most = in_features * (rows[-1] if flat else 1)
    if values.shape[:-1] != (rows[:-1] if flat else rows) or values.shape[-1] > most:
        raise ValueError(
            f"{name} with a mask of shape {tuple(mask.shape)} needs values of shape "
            f"{(*rows, 'kept')} or {(*rows[:-1], 'kept')}, but it is {tuple(values.shape)}"
        )
    _check_scale(name, scale, (*rows, -(-in_features // reference.SCALE_COLUMNS)), integers)


def _check_scale(
    name: str, scale: Tensor | None, expected: tuple[int, ...], integers: bool
) -> None:
    if not integers:
        if scale is not None:
            raise ValueError(f"{name} has floating-point values, so it takes no scale")
    elif scale is None or scale.dtype != torch.bfloat16 or tuple(scale.shape) != expected:
        came = "there is none" if scale is None else f"it is {scale.dtype} {tuple(scale.shape)}"
        raise ValueError(
            f"{name} has integer values, so it needs a bfloat16 scale of shape {expected}, "
            f"but {came}"
        )


def _check_width(name: str, tensor: Tensor, width: int) -> None:
    if tensor.shape[-1] != width or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point tensor of width {width}, "
            f"but it is {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


_linear = torch.library.custom_op("moiety::sparse_linear", reference.sparse_linear, mutates_args=())


@_linear.register_fake
def _(input_TI: Tensor, values: Tensor, mask_OB: Tensor, *_rest: object) -> Tensor:
    return input_TI.new_empty(input_TI.shape[0], mask_OB.shape[0])


_linear_backward = torch.library.custom_op(
    "moiety::sparse_linear_backward", reference.sparse_linear_backward, mutates_args=()
)


@_linear_backward.register_fake
def _(
    gradient_TO: Tensor, values: Tensor, mask_OB: Tensor, in_features: int, *_rest: object
) -> Tensor:
    return gradient_TO.new_empty(gradient_TO.shape[0], in_features)


def _linear_save(ctx, inputs, output) -> None:
    _input, values, mask_OB, in_features, scale_OG = inputs
    ctx.save_for_backward(values, mask_OB, scale_OG)
    ctx.in_features = in_features


def _linear_gradient(ctx, gradient_TO):
    values, mask_OB, scale_OG = ctx.saved_tensors
    gradient_TI = torch.ops.moiety.sparse_linear_backward(
        gradient_TO, values, mask_OB, ctx.in_features, scale_OG
    )
    return gradient_TI, None, None, None, None


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
    *tensors, activation, gate_up_scale, down_scale = inputs
    ctx.save_for_backward(*tensors, gate_up_scale, down_scale)
    ctx.activation = activation


def _experts_gradient(ctx, gradient_TD):
    *tensors, gate_up_scale, down_scale = ctx.saved_tensors
    d_hidden_TD, d_weights_TA = torch.ops.moiety.sparse_experts_backward(
        gradient_TD.contiguous(), *tensors, ctx.activation, gate_up_scale, down_scale
    )
    return d_hidden_TD, *[None] * 5, d_weights_TA, *[None] * 3


_experts.register_autograd(_experts_gradient, setup_context=_experts_save)
