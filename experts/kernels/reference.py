"""Plain PyTorch versions of every sparse op: the specification that faster kernels must match.

The ops take dense matrices, expanded from packed ones by `expand` just before they are used.

A packed matrix (O, I) is three tensors. `mask_OB` has one bit a column, eight columns a byte,
lowest bit first; bits past the last column are 0. `values` are the kept weights in row-major
order: (O, K) where every row keeps K of them (N:M), else flat (a density). Floating-point values
are the weights themselves and come without `scale_OG`. int8 values, and uint8 ones that hold two
4-bit codes each, are integers to be multiplied by `scale_OG` (bf16), one scale a row for each
128 columns of the dense matrix.

T tokens, D model width, F expert width, E experts, A active experts, O/I out/in features,
K kept values a row, B mask bytes a row, G scales a row, N tokens of one expert.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
SCALE_COLUMNS = 128
CODE_OFFSET = 8


@functools.cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """Row b holds the eight bits of byte b as eight booleans, viewed as one int64 for one lookup."""
    byte = torch.arange(256, device=device)
    bits = byte[:, None] >> torch.arange(8, device=device) & 1
    return bits.bool().view(torch.int64).reshape(-1)


def unpack_bits(mask_OB: Tensor, in_features: int) -> Tensor:
    """Boolean mask (..., in_features) of packed bits (..., bytes)."""
    eights = _bits_of_bytes(mask_OB.device).index_select(0, mask_OB.reshape(-1).int())
    bits = eights.view(torch.bool).reshape(*mask_OB.shape[:-1], -1)
    return bits[..., :in_features]


def pack_bits(mask_OI: Tensor) -> Tensor:
    """Packed bits (..., ceil(columns / 8)) of a boolean mask, lowest bit first."""
    padded = functional.pad(mask_OI.to(torch.uint8), (0, -mask_OI.shape[-1] % 8))
    eights = rearrange(padded, "... (b eight) -> eight ... b", eight=8)
    packed = eights[0].contiguous()
    for place in range(1, 8):
        packed |= eights[place] << place
    return packed


def unpack_codes(values: Tensor) -> Tensor:
    """The int8 codes (..., 2n) of n bytes: low half first, each stored 8 higher than it is."""
    halves = torch.stack([values & 15, values >> 4], dim=-1)
    return halves.flatten(-2).to(torch.int8) - CODE_OFFSET


def pack_codes(codes: Tensor) -> Tensor:
    """Codes -7..7 (..., n), two a byte (..., ceil(n / 2)); the half past an odd end is 0."""
    stored = functional.pad((codes + CODE_OFFSET).to(torch.uint8), (0, codes.shape[-1] % 2))
    return stored[..., 0::2] | stored[..., 1::2] << 4


def spread_scale(scale_OG: Tensor, in_features: int) -> Tensor:
    """The scale of every column (..., in_features) in fp32."""
    return scale_OG.float().repeat_interleave(SCALE_COLUMNS, dim=-1)[..., :in_features]


def expand(
    values: Tensor, mask_OB: Tensor, in_features: int, scale_OG: Tensor | None = None
) -> Tensor:
    """The dense matrix (..., O, in_features) of a packed one, zeros where nothing is kept.

    In the values' own dtype, or in fp32 where there are scales.
    """
    mask_OI = unpack_bits(mask_OB, in_features)
    if scale_OG is None:
        return values.new_zeros(mask_OI.shape).masked_scatter_(mask_OI, values)
    if values.dtype == torch.uint8:
        codes = unpack_codes(values)
        values = codes[..., : int(mask_OI.sum()) // codes.shape[:-1].numel()]
    dense_OI = torch.zeros(mask_OI.shape, dtype=torch.float32, device=values.device)
    dense_OI.masked_scatter_(mask_OI, values.float())
    return dense_OI.mul_(spread_scale(scale_OG, in_features))


Dense = Callable[[int], Tensor]


def sparse_linear(input_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """`input @ weightᵀ`, in the input's dtype."""
    return functional.linear(input_TI, weight_OI)


def sparse_linear_backward(gradient_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """Gradient of `sparse_linear` with respect to its input (the weight is frozen)."""
    return gradient_TO @ weight_OI


def _routed(experts_TA: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each matrix that has tokens, their places and slots; an index past the stack is skipped."""
    for expert in range(count):
        token_N, slot_N = torch.where(experts_TA == expert)
        if len(token_N):
            yield expert, token_N, slot_N


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def routed_sum(
    input_TI: Tensor,
    compute: Callable[[int, Tensor], Tensor],
    count: int,
    output_TO: Tensor,
    experts_TA: Tensor,
    weights_TA: Tensor,
) -> Tensor:
    """Add each token's `Σ_a w_a · compute(a, x)` to the wide `output_TO`; in the input's dtype."""
    for expert, token_N, slot_N in _routed(experts_TA, count):
        result_NO = compute(expert, input_TI[token_N]).to(output_TO.dtype)
        weight_N = weights_TA[token_N, slot_N].to(output_TO.dtype)
        output_TO.index_add_(0, token_N, result_NO * weight_N[:, None])
    return output_TO.to(input_TI.dtype)


def sparse_routed_linear(
    input_TI: Tensor,
    dense: Dense,
    count: int,
    rows: int,
    experts_TA: Tensor,
    weights_TA: Tensor,
    base_TO: Tensor | None = None,
) -> Tensor:
    """Weighted sum of each token's matrices, `base + Σ_a w_a · W_a x` (T, O).

    `dense` gives each of the `count` matrices (O, I). An index in `experts_TA` that is none of
    them contributes nothing (expert parallelism's sentinel).
    """

    def compute(expert: int, input_NI: Tensor) -> Tensor:
        return functional.linear(input_NI, dense(expert))

    output_TO = input_TI.new_zeros(len(input_TI), rows, dtype=_wide(input_TI))
    if base_TO is not None:
        output_TO += base_TO
    return routed_sum(input_TI, compute, count, output_TO, experts_TA, weights_TA)


def sparse_routed_linear_backward(
    gradient_TO: Tensor,
    input_TI: Tensor,
    dense: Dense,
    count: int,
    experts_TA: Tensor,
    weights_TA: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `sparse_routed_linear` with respect to `input_TI` and `weights_TA`."""
    d_input_TI = torch.zeros_like(input_TI, dtype=_wide(input_TI))
    d_weights_TA = torch.zeros_like(weights_TA)
    for expert, token_N, slot_N in _routed(experts_TA, count):
        back_NI = gradient_TO[token_N] @ dense(expert)
        d_weight_N = (back_NI * input_TI[token_N]).sum(-1)
        d_weights_TA[token_N, slot_N] = d_weight_N.to(weights_TA.dtype)
        weight_N = weights_TA[token_N, slot_N, None].to(d_input_TI.dtype)
        d_input_TI.index_add_(0, token_N, back_NI.to(d_input_TI.dtype) * weight_N)
    return d_input_TI.to(input_TI.dtype), d_weights_TA


def sparse_experts(
    hidden_TD: Tensor,
    gate_up: Dense,
    down: Dense,
    count: int,
    experts_TA: Tensor,
    weights_TA: Tensor,
    activation: str,
) -> Tensor:
    """Weighted sum of each token's gated experts: `Σ_a w_a · down_a(act(gate_a x) ⊙ up_a x)`.

    `gate_up` gives the gate above the up matrix (2F, D) of each of the `count` experts, `down`
    (D, F). An index in `experts_TA` that is none of them contributes nothing.
    """

    def compute(expert: int, hidden_ND: Tensor) -> Tensor:
        gate_NF, up_NF = functional.linear(hidden_ND, gate_up(expert)).chunk(2, dim=-1)
        return functional.linear(activate(gate_NF, activation) * up_NF, down(expert))

    output_TD = torch.zeros_like(hidden_TD, dtype=_wide(hidden_TD))
    return routed_sum(hidden_TD, compute, count, output_TD, experts_TA, weights_TA)


def sparse_experts_backward(
    gradient_TD: Tensor,
    hidden_TD: Tensor,
    gate_up: Dense,
    down: Dense,
    count: int,
    experts_TA: Tensor,
    weights_TA: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of `sparse_experts` with respect to `hidden_TD` and `weights_TA`.

    Activations are computed again instead of kept, so nothing dense outlives the call.
    """
    d_hidden_TD = torch.zeros_like(hidden_TD, dtype=_wide(hidden_TD))
    d_weights_TA = torch.zeros_like(weights_TA)
    for expert, token_N, slot_N in _routed(experts_TA, count):
        gate_up_HD = gate_up(expert)
        both_NH = functional.linear(hidden_TD[token_N], gate_up_HD)
        gate_NF, up_NF = both_NH.chunk(2, dim=-1)
        active_NF = activate(gate_NF, activation)
        d_inner_NF = gradient_TD[token_N] @ down(expert)
        d_weight_N = (d_inner_NF * active_NF * up_NF).sum(-1)
        d_weights_TA[token_N, slot_N] = d_weight_N.to(weights_TA.dtype)
        d_inner_NF = d_inner_NF * weights_TA[token_N, slot_N, None].to(d_inner_NF.dtype)
        d_gate_NF = activation_gradient(d_inner_NF * up_NF, gate_NF, activation)
        d_both_NH = torch.cat([d_gate_NF, d_inner_NF * active_NF], dim=-1)
        d_hidden_TD.index_add_(0, token_N, (d_both_NH @ gate_up_HD).to(d_hidden_TD.dtype))
    return d_hidden_TD.to(hidden_TD.dtype), d_weights_TA


def activate(gate_NF: Tensor, activation: str) -> Tensor:
    """The expert's activation function by its name in a transformers configuration."""
    match activation:
        case "silu":
            return functional.silu(gate_NF)
        case "gelu":
            return functional.gelu(gate_NF)
        case "gelu_pytorch_tanh":
            return functional.gelu(gate_NF, approximate="tanh")
        case "relu":
            return functional.relu(gate_NF)
    raise ValueError(f"activation must be one of {ACTIVATIONS}, but it is {activation!r}")


def activation_gradient(gradient_NF: Tensor, gate_NF: Tensor, activation: str) -> Tensor:
    """The gradient with respect to the activation's input."""
    aten = torch.ops.aten
    match activation:
        case "silu":
            return aten.silu_backward(gradient_NF, gate_NF)
        case "gelu":
            return aten.gelu_backward(gradient_NF, gate_NF)
        case "gelu_pytorch_tanh":
            return aten.gelu_backward(gradient_NF, gate_NF, approximate="tanh")
        case "relu":
            return gradient_NF * (gate_NF > 0)
    raise ValueError(f"activation must be one of {ACTIVATIONS}, but it is {activation!r}")
