"""The public sparse ops: differentiable in activations and routing weights, never in the matrices.

`reference.py` specifies what each op computes and how a packed matrix is laid out; compiled
kernels take over on the CPU where they are built (`library.py`), Triton's on a GPU (`cuda/`).

T tokens, D model width, F expert width, A active experts, O/I out/in features.
"""

import torch
from torch import Tensor

from moiety.experts.kernels import ops as _ops
from moiety.experts.kernels.crossover import reads_faster
from moiety.experts.kernels.direct import unwatched
from moiety.experts.kernels.gpu import gpu_kernels
from moiety.experts.kernels.layouts import dense, tiled, untiled, with_starts
from moiety.experts.kernels.library import description
from moiety.experts.kernels.reference import ACTIVATIONS
from moiety.experts.kernels.weights import Weights, packed

__all__ = [
    "Weights",
    "dense",
    "dense_linear",
    "description",
    "gpu_kernels",
    "packed",
    "reads_faster",
    "sparse_experts",
    "sparse_linear",
    "sparse_routed_linear",
    "tiled",
    "untiled",
    "with_starts",
]


def sparse_linear(input: Tensor, weights: Weights) -> Tensor:
    """`input @ weightᵀ` (..., O) for one packed matrix and an input (..., I).

    ValueError when the width does not fit, or when the mask and the values disagree.
    """
    _check_width("input", input, weights.columns)
    flat_TI = input if input.dim() == 2 else input.reshape(-1, weights.columns)
    if unwatched(flat_TI, weights.values):
        output_TO = _ops.linear(flat_TI, weights)
    else:
        output_TO = torch.ops.moiety.sparse_linear(flat_TI, *weights)
    return output_TO if input.dim() == 2 else output_TO.view(*input.shape[:-1], weights.rows)


def dense_linear(input: Tensor, weight_OI: Tensor) -> Tensor:
    """`input @ weightᵀ` (..., O) for a dense matrix: torch's product, but few tokens read faster.

    ValueError when the width or the dtype does not fit.
    """
    if weight_OI.dim() != 2 or weight_OI.dtype != input.dtype:
        raise ValueError(
            f"expected a matrix of the input's dtype, {input.dtype}, but it is "
            f"{weight_OI.dtype} of shape {tuple(weight_OI.shape)}"
        )
    _check_width("input", input, weight_OI.shape[1])
    flat_TI = input if input.dim() == 2 else input.reshape(-1, weight_OI.shape[1])
    if unwatched(flat_TI, weight_OI):
        output_TO = _ops.dense_linear(flat_TI, weight_OI)
    else:
        output_TO = torch.ops.moiety.dense_linear(flat_TI, weight_OI)
    return output_TO if input.dim() == 2 else output_TO.view(*input.shape[:-1], len(weight_OI))


def sparse_routed_linear(
    input_TI: Tensor,
    weights: Weights,
    experts_TA: Tensor,
    weights_TA: Tensor,
    base_TO: Tensor | None = None,
) -> Tensor:
    """Routed sum of packed matrices, `base + Σ_a w_a · W_a x` (T, O).

    An index in `experts_TA` outside the stack adds nothing. ValueError when shapes do not fit.
    """
    _check_width("input", input_TI, weights.columns)
    _check_routes(input_TI, experts_TA, weights_TA)
    expected = (len(input_TI), weights.rows)
    if base_TO is not None and tuple(base_TO.shape) != expected:
        raise ValueError(f"expected a base of shape {expected}, but it is {tuple(base_TO.shape)}")
    routes = (experts_TA, weights_TA, base_TO)
    if unwatched(input_TI, weights.values, weights_TA, base_TO):
        return _ops.routed(input_TI, weights, *routes)
    return torch.ops.moiety.sparse_routed_linear(input_TI, *weights, *routes)


def sparse_experts(
    hidden_TD: Tensor,
    gate_up: Weights,
    down: Weights,
    experts_TA: Tensor,
    weights_TA: Tensor,
    activation: str = "silu",
) -> Tensor:
    """A whole routed block of gated experts, `Σ_a w_a · down_a(act(gate_a x) ⊙ up_a x)` (T, D).

    `gate_up` holds gate above up (2F, D) for each expert of `down` (D, F), or, tiled, the gate and
    the up matrix (F, D) of each expert one after the other. An index in `experts_TA` that is no
    expert adds nothing. ValueError when shapes, layouts or the activation do not fit.
    """
    split = gate_up.is_tiled
    fits = (
        gate_up.layout == down.layout
        and gate_up.stack == (2 if split else 1) * down.stack
        and gate_up.rows == (1 if split else 2) * down.columns
        and gate_up.columns == down.rows
    )
    if not fits:
        raise ValueError(
            f"expected gate and up matrices for down matrices {_shape(down)} in the same layout, "
            f"but they are {_shape(gate_up)}"
        )
    _check_width("hidden", hidden_TD, gate_up.columns)
    _check_routes(hidden_TD, experts_TA, weights_TA)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, but it is {activation!r}")
    routes = (experts_TA, weights_TA, activation)
    if unwatched(hidden_TD, gate_up.values, down.values, weights_TA):
        return _ops.experts(hidden_TD, gate_up, down, *routes)
    return torch.ops.moiety.sparse_experts(hidden_TD, *gate_up, *down, *routes)


def _shape(weights: Weights) -> str:
    return f"{weights.stack} x ({weights.rows}, {weights.columns}), {weights.layout}"


def _check_width(name: str, tensor: Tensor, width: int) -> None:
    if tensor.shape[-1] != width or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point tensor of width {width}, "
            f"but it is {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def _check_routes(input_TI: Tensor, experts_TA: Tensor, weights_TA: Tensor) -> None:
    fits = input_TI.dim() == 2 and experts_TA.dim() == 2
    if not fits or experts_TA.shape != weights_TA.shape or len(experts_TA) != len(input_TI):
        raise ValueError(
            f"experts and weights must be (tokens, active) for an input (tokens, width) of shape "
            f"{tuple(input_TI.shape)}, but they are {tuple(experts_TA.shape)} and "
            f"{tuple(weights_TA.shape)}"
        )
    if experts_TA.is_floating_point() or not weights_TA.is_floating_point():
        raise ValueError(
            "experts must be integers and weights floating-point numbers, but they are "
            f"{experts_TA.dtype} and {weights_TA.dtype}"
        )
