"""The sparse ops as torch.library sees them: schemas, CPU and plain implementations, gradients.

A stack of matrices is seven arguments, the fields of `Weights`. The CPU implementation takes the
compiled kernels where they are and the dtype is theirs, else the plain twin of `reference.py`
on matrices expanded one at a time.

T tokens, D model width, F expert width, A active experts, O/I out/in features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moiety.experts.kernels import layouts, reference
from moiety.experts.kernels.weights import Weights, contiguous

_LIBRARY = torch.library.Library("moiety", "DEF")
_FIELDS = 7
_NATIVE = (torch.float32, torch.bfloat16)


def _stack(name: str) -> str:
    return (
        f"Tensor {name}_values, Tensor? {name}_mask, Tensor? {name}_scale, "
        f"int {name}_rows, int {name}_columns, str {name}_kind, Tensor? {name}_starts"
    )


def _define(name: str, schema: str, run: Callable, fake: Callable) -> None:
    _LIBRARY.define(f"{name}({schema}")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moiety::{name}", fake, lib=_LIBRARY)


def _dense(weights: Weights, dtype: torch.dtype) -> reference.Dense:
    return lambda which: layouts.dense(weights, which, dtype)


def _half(tensor: Tensor) -> bool:
    """fp16 goes through the kernels as fp32, which holds it exactly."""
    return tensor.dtype == torch.float16


def _linear(input_TI: Tensor, *fields) -> Tensor:
    weights, kernels = Weights(*fields), layouts.native(input_TI)
    if kernels is None or not (input_TI.dtype in _NATIVE or _half(input_TI)):
        return reference.sparse_linear(input_TI, layouts.dense(weights, 0, input_TI.dtype))
    wide_TI = input_TI.float() if _half(input_TI) else input_TI
    return kernels.forward(wide_TI.contiguous(), contiguous(weights)).to(input_TI.dtype)


def _linear_backward(gradient_TO: Tensor, *fields) -> Tensor:
    weight_OI = layouts.dense(Weights(*fields), 0, gradient_TO.dtype)
    return reference.sparse_linear_backward(gradient_TO, weight_OI)


_define(
    "sparse_linear",
    f"Tensor input, {_stack('weight')}) -> Tensor",
    _linear,
    lambda input_TI, *fields: input_TI.new_empty(len(input_TI), fields[3]),
)
_define(
    "sparse_linear_backward",
    f"Tensor gradient, {_stack('weight')}) -> Tensor",
    _linear_backward,
    lambda gradient_TO, *fields: gradient_TO.new_empty(len(gradient_TO), fields[4]),
)


def _linear_save(ctx, inputs, output) -> None:
    _input, values, mask, scale, *ctx.shape, starts = inputs
    ctx.save_for_backward(values, mask, scale, starts)


def _linear_gradient(ctx, gradient_TO):
    values, mask, scale, starts = ctx.saved_tensors
    fields = (values, mask, scale, *ctx.shape, starts)
    back_TI = torch.ops.moiety.sparse_linear_backward(gradient_TO.contiguous(), *fields)
    return back_TI, *[None] * _FIELDS


torch.library.register_autograd(
    "moiety::sparse_linear", _linear_gradient, setup_context=_linear_save, lib=_LIBRARY
)


def _routed(input_TI: Tensor, *rest) -> Tensor:
    weights, (experts_TA, weights_TA, base_TO) = Weights(*rest[:_FIELDS]), rest[_FIELDS:]
    kernels = layouts.native(input_TI)
    if kernels is None or not (input_TI.dtype in _NATIVE or _half(input_TI)):
        dense = _dense(weights, input_TI.dtype)
        routes = (experts_TA, weights_TA, base_TO)
        return reference.sparse_routed_linear(input_TI, dense, weights.stack, weights.rows, *routes)
    wide_TI = input_TI.float() if _half(input_TI) else input_TI
    output_TO = kernels.forward(
        wide_TI.contiguous(),
        contiguous(weights),
        experts_TA=experts_TA.long().contiguous(),
        weights_TA=weights_TA.float().contiguous(),
        base_TO=None if base_TO is None else base_TO.to(wide_TI.dtype).contiguous(),
    )
    return output_TO.to(input_TI.dtype)


def _routed_backward(gradient_TO: Tensor, input_TI: Tensor, *rest) -> tuple[Tensor, Tensor]:
    weights, routes = Weights(*rest[:_FIELDS]), rest[_FIELDS:]
    dense = _dense(weights, input_TI.dtype)
    return reference.sparse_routed_linear_backward(
        gradient_TO, input_TI, dense, weights.stack, *routes
    )


_define(
    "sparse_routed_linear",
    f"Tensor input, {_stack('weight')}, Tensor experts, Tensor weights, Tensor? base) -> Tensor",
    _routed,
    lambda input_TI, *rest: input_TI.new_empty(len(input_TI), rest[3]),
)
_define(
    "sparse_routed_linear_backward",
    f"Tensor gradient, Tensor input, {_stack('weight')}, Tensor experts, Tensor weights) "
    "-> (Tensor, Tensor)",
    _routed_backward,
    lambda _, input_TI, *rest: (torch.empty_like(input_TI), torch.empty_like(rest[_FIELDS + 1])),
)


def _routed_save(ctx, inputs, output) -> None:
    input_TI, values, mask, scale, *shape, starts, experts_TA, weights_TA, base_TO = inputs
    ctx.save_for_backward(input_TI, values, mask, scale, starts, experts_TA, weights_TA)
    ctx.shape, ctx.has_base = shape, base_TO is not None


def _routed_gradient(ctx, gradient_TO):
    input_TI, values, mask, scale, starts, *routes = ctx.saved_tensors
    fields = (values, mask, scale, *ctx.shape, starts)
    d_input_TI, d_weights_TA = torch.ops.moiety.sparse_routed_linear_backward(
        gradient_TO.contiguous(), input_TI, *fields, *routes
    )
    d_base_TO = gradient_TO if ctx.has_base else None
    return d_input_TI, *[None] * _FIELDS, None, d_weights_TA, d_base_TO


torch.library.register_autograd(
    "moiety::sparse_routed_linear", _routed_gradient, setup_context=_routed_save, lib=_LIBRARY
)


def _experts(hidden_TD: Tensor, *rest) -> Tensor:
    gate_up, down = Weights(*rest[:_FIELDS]), Weights(*rest[_FIELDS : 2 * _FIELDS])
    experts_TA, weights_TA, activation = rest[2 * _FIELDS :]
    kernels = layouts.native(hidden_TD)
    if kernels is None or not (hidden_TD.dtype in _NATIVE or _half(hidden_TD)):
        stacks = (_gate_up(gate_up, down, hidden_TD.dtype), _dense(down, hidden_TD.dtype))
        routes = (experts_TA, weights_TA, activation)
        return reference.sparse_experts(hidden_TD, *stacks, down.stack, *routes)
    wide_TD = hidden_TD.float() if _half(hidden_TD) else hidden_TD
    output_TD = kernels.forward(
        wide_TD.contiguous(),
        contiguous(down),
        gate_up=contiguous(gate_up),
        activation=activation,
        experts_TA=experts_TA.long().contiguous(),
        weights_TA=weights_TA.float().contiguous(),
    )
    return output_TD.to(hidden_TD.dtype)


def _gate_up(gate_up: Weights, down: Weights, dtype: torch.dtype) -> reference.Dense:
    """Gate above up of each expert: one matrix in the rows layout, two in tiles."""
    if gate_up.stack == down.stack:
        return _dense(gate_up, dtype)
    dense = _dense(gate_up, dtype)
    return lambda expert: torch.cat([dense(2 * expert), dense(2 * expert + 1)])


def _experts_backward(gradient_TD: Tensor, hidden_TD: Tensor, *rest) -> tuple[Tensor, Tensor]:
    gate_up, down = Weights(*rest[:_FIELDS]), Weights(*rest[_FIELDS : 2 * _FIELDS])
    stacks = (_gate_up(gate_up, down, hidden_TD.dtype), _dense(down, hidden_TD.dtype))
    routes = rest[2 * _FIELDS :]
    return reference.sparse_experts_backward(gradient_TD, hidden_TD, *stacks, down.stack, *routes)


_define(
    "sparse_experts",
    f"Tensor hidden, {_stack('gate_up')}, {_stack('down')}, Tensor experts, Tensor weights, "
    "str activation) -> Tensor",
    _experts,
    lambda hidden_TD, *rest: torch.empty_like(hidden_TD, memory_format=torch.contiguous_format),
)
_define(
    "sparse_experts_backward",
    f"Tensor gradient, Tensor hidden, {_stack('gate_up')}, {_stack('down')}, Tensor experts, "
    "Tensor weights, str activation) -> (Tensor, Tensor)",
    _experts_backward,
    lambda _, hidden_TD, *rest: (torch.empty_like(hidden_TD), torch.empty_like(rest[-2])),
)


def _experts_save(ctx, inputs, output) -> None:
    hidden_TD, *stacks = inputs[: 1 + 2 * _FIELDS]
    experts_TA, weights_TA, ctx.activation = inputs[1 + 2 * _FIELDS :]
    gate_up, down = Weights(*stacks[:_FIELDS]), Weights(*stacks[_FIELDS:])
    ctx.shapes = gate_up[3:6], down[3:6]
    tensors = (tensor for one in (gate_up, down) for tensor in (*one[:3], one.starts))
    ctx.save_for_backward(hidden_TD, *tensors, experts_TA, weights_TA)


def _experts_gradient(ctx, gradient_TD):
    hidden_TD, *tensors, experts_TA, weights_TA = ctx.saved_tensors
    gate_up = (*tensors[:3], *ctx.shapes[0], tensors[3])
    down = (*tensors[4:7], *ctx.shapes[1], tensors[7])
    routes = (experts_TA, weights_TA, ctx.activation)
    d_hidden_TD, d_weights_TA = torch.ops.moiety.sparse_experts_backward(
        gradient_TD.contiguous(), hidden_TD, *gate_up, *down, *routes
    )
    return d_hidden_TD, *[None] * (2 * _FIELDS + 1), d_weights_TA, None


torch.library.register_autograd(
    "moiety::sparse_experts", _experts_gradient, setup_context=_experts_save, lib=_LIBRARY
)
