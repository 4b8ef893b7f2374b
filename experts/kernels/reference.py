"""Plain PyTorch versions of every sparse op: the specification that faster kernels must match.

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
from collections.abc import Iterator
from dataclasses import dataclass

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


def sparse_linear(
    input_TI: Tensor,
    values: Tensor,
    mask_OB: Tensor,
    in_features: int,
    scale_OG: Tensor | None = None,
) -> Tensor:
    """`input @ weightᵀ` for a packed weight, in the input's dtype."""
    weight_OI = expand(values, mask_OB, in_features, scale_OG).to(input_TI.dtype)
    return functional.linear(input_TI, weight_OI)


def sparse_linear_backward(
    gradient_TO: Tensor,
    values: Tensor,
    mask_OB: Tensor,
    in_features: int,
    scale_OG: Tensor | None = None,
) -> Tensor:
    """Gradient of `sparse_linear` with respect to its input (the weight is frozen)."""
    return gradient_TO @ expand(values, mask_OB, in_features, scale_OG).to(gradient_TO.dtype)


@dataclass(frozen=True)
class _Routed:
    """The tokens of one expert, gathered, with its expanded matrices."""

    token_N: Tensor
    slot_N: Tensor
    hidden_ND: Tensor
    gate_up_HD: Tensor
    down_DF: Tensor


Stack = tuple[Tensor, Tensor, Tensor | None]


def _expert(stack: Stack, expert: int, in_features: int, dtype: torch.dtype) -> Tensor:
    values, mask, scale = stack
    one_scale = None if scale is None else scale[expert]
    return expand(values[expert], mask[expert], in_features, one_scale).to(dtype)


def _routed(
    hidden_TD: Tensor, gate_up: Stack, down: Stack, experts_TA: Tensor
) -> Iterator[_Routed]:
    """Each expert that has tokens; an index outside the stored experts is skipped."""
    width = gate_up[1].shape[1] // 2
    for expert in range(gate_up[1].shape[0]):
        token_N, slot_N = torch.where(experts_TA == expert)
        if len(token_N):
            yield _Routed(
                token_N,
                slot_N,
                hidden_TD[token_N],
                _expert(gate_up, expert, hidden_TD.shape[1], hidden_TD.dtype),
                _expert(down, expert, width, hidden_TD.dtype),
            )


def sparse_experts(
    hidden_TD: Tensor,
    gate_up_values: Tensor,
    gate_up_mask: Tensor,
    down_values: Tensor,
    down_mask: Tensor,
    experts_TA: Tensor,
    weights_TA: Tensor,
    activation: str,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """Weighted sum of each token's gated experts: `Σ_a w_a · down_a(act(gate_a x) ⊙ up_a x)`.

    `gate_up_values` and `gate_up_mask` (E, 2F, B) stack gate above up. An index in `experts_TA`
    that is no stored expert contributes nothing (expert parallelism's sentinel).
    """
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    output_TD = torch.zeros_like(hidden_TD, dtype=wide)
    gate_up, down = (
        (gate_up_values, gate_up_mask, gate_up_scale),
        (down_values, down_mask, down_scale),
    )
    for part in _routed(hidden_TD, gate_up, down, experts_TA):
        gate_NF, up_NF = functional.linear(part.hidden_ND, part.gate_up_HD).chunk(2, dim=-1)
        inner_NF = activate(gate_NF, activation) * up_NF
        result_ND = functional.linear(inner_NF, part.down_DF)
        weight_N = weights_TA[part.token_N, part.slot_N].to(wide)
        output_TD.index_add_(0, part.token_N, result_ND.to(wide) * weight_N[:, None])
    return output_TD.to(hidden_TD.dtype)


def sparse_experts_backward(
    gradient_TD: Tensor,
    hidden_TD: Tensor,
    gate_up_values: Tensor,
    gate_up_mask: Tensor,
    down_values: Tensor,
    down_mask: Tensor,
    experts_TA: Tensor,
    weights_TA: Tensor,
    activation: str,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `sparse_experts` with respect to `hidden_TD` and `weights_TA`.

    Activations are computed again instead of kept, so nothing dense outlives the call.
    """
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    d_hidden_TD = torch.zeros_like(hidden_TD, dtype=wide)
    d_weights_TA = torch.zeros_like(weights_TA)
    gate_up, down = (
        (gate_up_values, gate_up_mask, gate_up_scale),
        (down_values, down_mask, down_scale),
    )
    for part in _routed(hidden_TD, gate_up, down, experts_TA):
        gate_NF, up_NF = functional.linear(part.hidden_ND, part.gate_up_HD).chunk(2, dim=-1)
        active_NF = activate(gate_NF, activation)
        d_result_ND = gradient_TD[part.token_N]
        d_inner_NF = d_result_ND @ part.down_DF
        d_weight_N = (d_inner_NF * active_NF * up_NF).sum(-1)
        d_weights_TA[part.token_N, part.slot_N] = d_weight_N.to(weights_TA.dtype)
        d_inner_NF = d_inner_NF * weights_TA[part.token_N, part.slot_N, None].to(d_inner_NF.dtype)
        d_gate_NF = activation_gradient(d_inner_NF * up_NF, gate_NF, activation)
        d_both_NH = torch.cat([d_gate_NF, d_inner_NF * active_NF], dim=-1)
        d_hidden_TD.index_add_(0, part.token_N, (d_both_NH @ part.gate_up_HD).to(wide))
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
