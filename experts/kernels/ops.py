"""The sparse ops as torch.library sees them: schemas, CPU and plain implementations, gradients.

A stack of matrices is seven arguments, the fields of `Weights`, tensors
first. On the CPU the compiled kernels do the work, on a GPU the Triton ones, where they are and
layout and dtype are theirs, else the plain twin of `reference.py` on matrices expanded one at a
time; so it does where torch's dense product is the faster one (`crossover.py`).

T tokens, D model width, F expert width, A active experts, O/I out/in features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moiety.experts.kernels import layouts, reference
from moiety.experts.kernels.crossover import better_dense, reads_faster
from moiety.experts.kernels.gpu import gpu_kernels
from moiety.experts.kernels.library import KERNEL_DTYPES, library
from moiety.experts.kernels.weights import Weights, contiguous

_LIBRARY = torch.library.Library("moiety", "DEF")
_FIELDS = len(Weights._fields)
_TENSORS = 4
# fp16 goes through the kernels as fp32, which holds it exactly.
_COMPUTED_AS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float32,
}


def _stack(name: str) -> str:
    return (
        f"Tensor {name}_values, Tensor? {name}_mask, Tensor? {name}_scale, Tensor? {name}_starts, "
        f"int {name}_rows, int {name}_columns, str {name}_kind"
    )


def _define(name: str, schema: str, run: Callable, fake: Callable) -> None:
    _LIBRARY.define(f"{name}({schema}")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moiety::{name}", fake, lib=_LIBRARY)


def _dense(weights: Weights, dtype: torch.dtype) -> reference.Dense:
    return lambda which: layouts.dense(weights, which, dtype)


def _compiled(
    input_TI: Tensor,
    down: Weights,
    gate_up: Weights | None = None,
    activation: str = "silu",
    experts_TA: Tensor | None = None,
    weights_TA: Tensor | None = None,
    base_TO: Tensor | None = None,
) -> Tensor | None:
    """What the compiled kernels give, in the input's dtype; None where they do not work.

    Nor do they where a dense product is faster.
    """
    if input_TI.is_cuda:
        gpu = gpu_kernels(input_TI.device)
        routes = {"experts_TA": experts_TA, "weights_TA": weights_TA, "base_TO": base_TO}
        plain = {"gate_up": gate_up, "activation": activation, **routes}
        return None if gpu is None else gpu.forward(input_TI, down, **plain)
    kernels, dtype = layouts.native(input_TI), _COMPUTED_AS.get(input_TI.dtype)
    if kernels is None or dtype is None:
        return None
    routed = 1.0 if experts_TA is None else experts_TA.shape[1] / down.stack
    if better_dense(input_TI, down, input_TI.shape[0] * routed):
        return None
    output_TO = kernels.forward(
        _as(input_TI, dtype),
        contiguous(down),
        gate_up=None if gate_up is None else contiguous(gate_up),
        activation=activation,
        experts_TA=None if experts_TA is None else _as(experts_TA, torch.int64),
        weights_TA=None if weights_TA is None else _as(weights_TA, torch.float32),
        base_TO=None if base_TO is None else _as(base_TO, dtype),
    )
    return output_TO if output_TO.dtype == input_TI.dtype else output_TO.to(input_TI.dtype)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and of a dtype; asking first is cheaper than a call that changes nothing."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def linear(input_TI: Tensor, weights: Weights) -> Tensor:
    """What `sparse_linear` runs."""
    tiles = weights.is_tiled and weights.values.is_contiguous()
    if tiles and input_TI.is_cpu and input_TI.is_contiguous():
        kernels = library()
        if kernels is not None and input_TI.dtype in KERNEL_DTYPES:
            return kernels.linear(input_TI, weights)
    output_TO = _compiled(input_TI, weights)
    if output_TO is not None:
        return output_TO
    weight_OI, kernels = layouts.dense(weights, 0, input_TI.dtype), layouts.native(input_TI)
    if kernels is None:
        return reference.sparse_linear(input_TI, weight_OI)
    output_TO = kernels.empty(len(input_TI), weights.rows, input_TI.dtype)
    return torch.mm(input_TI, weight_OI.mT, out=output_TO)


def _linear_backward(gradient_TO: Tensor, *fields) -> Tensor:
    weight_OI = layouts.dense(Weights(*fields), 0, gradient_TO.dtype)
    return reference.sparse_linear_backward(gradient_TO, weight_OI)


_define(
    "sparse_linear",
    f"Tensor input, {_stack('weight')}) -> Tensor",
    lambda input_TI, *fields: linear(input_TI, Weights(*fields)),
    lambda input_TI, *fields: input_TI.new_empty(len(input_TI), Weights(*fields).rows),
)
_define(
    "sparse_linear_backward",
    f"Tensor gradient, {_stack('weight')}) -> Tensor",
    _linear_backward,
    lambda gradient_TO, *fields: gradient_TO.new_empty(len(gradient_TO), Weights(*fields).columns),
)


def _linear_save(ctx, inputs, output) -> None:
    _input, *fields = inputs
    ctx.save_for_backward(*fields[:_TENSORS])
    ctx.shape = fields[_TENSORS:]


def _linear_gradient(ctx, gradient_TO):
    fields = (*ctx.saved_tensors, *ctx.shape)
    back_TI = torch.ops.moiety.sparse_linear_backward(gradient_TO.contiguous(), *fields)
    return back_TI, *[None] * _FIELDS


torch.library.register_autograd(
    "moiety::sparse_linear", _linear_gradient, setup_context=_linear_save, lib=_LIBRARY
)


def dense_linear(input_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """What `dense_linear` runs."""
    _check_dense(input_TI, weight_OI)
    kernels = layouts.native(input_TI)
    if kernels is None or not reads_faster(input_TI, weight_OI):
        return torch.nn.functional.linear(input_TI, weight_OI)
    return kernels.dense_linear(input_TI.contiguous(), weight_OI)


def _dense_linear_fake(input_TI: Tensor, weight_OI: Tensor) -> Tensor:
    _check_dense(input_TI, weight_OI)
    return input_TI.new_empty(len(input_TI), len(weight_OI))


def _check_dense(input_TI: Tensor, weight_OI: Tensor) -> None:
    flat = input_TI.dim() == weight_OI.dim() == 2 and input_TI.shape[1] == weight_OI.shape[1]
    if not flat or input_TI.dtype != weight_OI.dtype:
        raise ValueError(
            f"expected tokens (T, I) and a matrix (O, I) of one dtype, but they are "
            f"{input_TI.dtype} {tuple(input_TI.shape)} and {weight_OI.dtype} "
            f"{tuple(weight_OI.shape)}"
        )


_define(
    "dense_linear",
    "Tensor input, Tensor weight) -> Tensor",
    dense_linear,
    _dense_linear_fake,
)


def _dense_linear_gradient(ctx, gradient_TO):
    input_TI, weight_OI = ctx.saved_tensors
    wanted_input, wanted_weight = ctx.needs_input_grad
    back_TI = gradient_TO @ weight_OI if wanted_input else None
    return back_TI, gradient_TO.mT @ input_TI if wanted_weight else None


torch.library.register_autograd(
    "moiety::dense_linear",
    _dense_linear_gradient,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=_LIBRARY,
)


def routed(
    input_TI: Tensor,
    weights: Weights,
    experts_TA: Tensor,
    weights_TA: Tensor,
    base_TO: Tensor | None,
) -> Tensor:
    """What `sparse_routed_linear` runs."""
    routes = {"experts_TA": experts_TA, "weights_TA": weights_TA, "base_TO": base_TO}
    output_TO = _compiled(input_TI, weights, **routes)
    if output_TO is not None:
        return output_TO
    dense = _dense(weights, input_TI.dtype)
    return reference.sparse_routed_linear(input_TI, dense, weights.stack, weights.rows, **routes)


def _routed_backward(gradient_TO: Tensor, input_TI: Tensor, *rest) -> tuple[Tensor, Tensor]:
    weights, routes = Weights(*rest[:_FIELDS]), rest[_FIELDS:]
    dense = _dense(weights, input_TI.dtype)
    return reference.sparse_routed_linear_backward(
        gradient_TO, input_TI, dense, weights.stack, *routes
    )


_define(
    "sparse_routed_linear",
    f"Tensor input, {_stack('weight')}, Tensor experts, Tensor weights, Tensor? base) -> Tensor",
    lambda input_TI, *rest: routed(input_TI, Weights(*rest[:_FIELDS]), *rest[_FIELDS:]),
    lambda input_TI, *rest: input_TI.new_empty(len(input_TI), Weights(*rest[:_FIELDS]).rows),
)
_define(
    "sparse_routed_linear_backward",
    f"Tensor gradient, Tensor input, {_stack('weight')}, Tensor experts, Tensor weights) "
    "-> (Tensor, Tensor)",
    _routed_backward,
    lambda _, input_TI, *rest: (torch.empty_like(input_TI), torch.empty_like(rest[_FIELDS + 1])),
)


def _routed_save(ctx, inputs, output) -> None:
    input_TI, *fields, experts_TA, weights_TA, base_TO = inputs
    ctx.save_for_backward(*fields[:_TENSORS], input_TI, experts_TA, weights_TA)
    ctx.shape, ctx.has_base = fields[_TENSORS:], base_TO is not None


def _routed_gradient(ctx, gradient_TO):
    *tensors, input_TI, experts_TA, weights_TA = ctx.saved_tensors
    d_input_TI, d_weights_TA = torch.ops.moiety.sparse_routed_linear_backward(
        gradient_TO.contiguous(), input_TI, *tensors, *ctx.shape, experts_TA, weights_TA
    )
    d_base_TO = gradient_TO if ctx.has_base else None
    return d_input_TI, *[None] * _FIELDS, None, d_weights_TA, d_base_TO


torch.library.register_autograd(
    "moiety::sparse_routed_linear", _routed_gradient, setup_context=_routed_save, lib=_LIBRARY
)


def experts(
    hidden_TD: Tensor,
    gate_up: Weights,
    down: Weights,
    experts_TA: Tensor,
    weights_TA: Tensor,
    activation: str,
) -> Tensor:
    """What `sparse_experts` runs."""
    output_TD = _compiled(hidden_TD, down, gate_up, activation, experts_TA, weights_TA)
    if output_TD is not None:
        return output_TD
    stacks = (_gate_up(gate_up, down, hidden_TD.dtype), _dense(down, hidden_TD.dtype))
    routes = (experts_TA, weights_TA, activation)
    return reference.sparse_experts(hidden_TD, *stacks, down.stack, *routes)


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
    lambda hidden_TD, *rest: experts(
        hidden_TD,
        Weights(*rest[:_FIELDS]),
        Weights(*rest[_FIELDS : 2 * _FIELDS]),
        *rest[2 * _FIELDS :],
    ),
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
    hidden_TD, *fields, experts_TA, weights_TA, ctx.activation = inputs
    gate_up, down = fields[:_FIELDS], fields[_FIELDS:]
    ctx.shapes = gate_up[_TENSORS:], down[_TENSORS:]
    tensors = (*gate_up[:_TENSORS], *down[:_TENSORS])
    ctx.save_for_backward(*tensors, hidden_TD, experts_TA, weights_TA)


def _experts_gradient(ctx, gradient_TD):
    *tensors, hidden_TD, experts_TA, weights_TA = ctx.saved_tensors
    gate_up = (*tensors[:_TENSORS], *ctx.shapes[0])
    down = (*tensors[_TENSORS:], *ctx.shapes[1])
    routes = (experts_TA, weights_TA, ctx.activation)
    d_hidden_TD, d_weights_TA = torch.ops.moiety.sparse_experts_backward(
        gradient_TD.contiguous(), hidden_TD, *gate_up, *down, *routes
    )
    return d_hidden_TD, *[None] * (2 * _FIELDS + 1), d_weights_TA, None


torch.library.register_autograd(
    "moiety::sparse_experts", _experts_gradient, setup_context=_experts_save, lib=_LIBRARY
)
