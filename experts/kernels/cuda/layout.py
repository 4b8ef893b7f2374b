"""The GPU kernels' own layout of 2:4 matrices, *planes*, and back to the stored one, bit for bit.

A span is 256 columns, 64 groups. A 32-bit word of codes holds the pattern numbers of eight groups
that are eight apart: word w of a span those of groups w, w + 8, ..., w + 56, so that one load of
codes serves eight loads of values in the same place of a thread. Floating-point values stay as they
are stored, two to a word. Integers are put in the same order: a word holds the values of two (int8)
or four (int4) of those eight groups. Scales lie two to a word, those of one span. Codes, integers
and scales are filled up to whole spans.

E matrices, O rows, S spans, W words, P planes, B bytes of a row.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from moiety.errors import InputError
from moiety.experts.kernels.reference import SCALE_COLUMNS
from moiety.experts.kernels.weights import Weights

WORDS = 8
PLANES = 8
GROUP = 4
SPAN = GROUP * WORDS * PLANES
# Pattern number -> the four mask bits of a group, lowest column first.
_MASKS = (0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100)
_ZERO_NIBBLES = 0x88
_SIGN = 128


def fits(weights: Weights) -> bool:
    """Whether the matrices are stored as 2:4 ones of a kind that the GPU kernels multiply."""
    values, mask = weights.values, weights.mask
    if mask is None or mask.dtype != torch.uint8 or values.dim() != 3 or weights.columns % GROUP:
        return False
    kept = weights.columns // 2
    expected = -(-kept // 2) if weights.kind == "int4" else kept
    return weights.kind != "fp32" and values.shape[-1] == expected


def planes(weights: Weights) -> Weights:
    """Stored 2:4 matrices as planes. ValueError where a group keeps other than two columns."""
    mask = weights.mask
    assert mask is not None
    nibbles = torch.stack([mask & 15, mask >> 4], dim=-1).flatten(-2)
    nibbles = nibbles[..., : weights.columns // GROUP]
    table = torch.full((16,), -1, dtype=torch.int8, device=mask.device)
    table[list(_MASKS)] = torch.arange(len(_MASKS), dtype=torch.int8, device=mask.device)
    numbers = table[nibbles.int()]
    if bool((numbers < 0).any()):
        raise InputError("expected 2:4 matrices for planes, but they are of another pattern")
    codes = _packed_codes(_filled(numbers, PLANES * WORDS, 0))
    scale = weights.scale
    if scale is not None:
        scale = _filled(scale, 2, 0).contiguous().view(torch.int32)
    return weights._replace(values=_values(weights), mask=codes, scale=scale, starts=None)


def stored(weights: Weights) -> Weights:
    """The stored matrices again."""
    codes = weights.mask
    assert codes is not None
    numbers = _unpacked_codes(codes)[..., : weights.columns // GROUP]
    bits = torch.tensor(_MASKS, dtype=torch.uint8, device=codes.device)[numbers.int()]
    bits = _filled(bits, 2, 0)
    mask = bits[..., 0::2] | bits[..., 1::2] << 4
    scale = weights.scale
    if scale is not None:
        groups = -(-weights.columns // SCALE_COLUMNS)
        scale = scale.view(torch.bfloat16)[..., :groups].contiguous()
    return weights._replace(values=_stored_values(weights), mask=mask, scale=scale)


def _filled(tensor: Tensor, multiple: int, value: int) -> Tensor:
    return functional.pad(tensor, (0, -tensor.shape[-1] % multiple), value=value)


def _packed_codes(numbers: Tensor) -> Tensor:
    spans = rearrange(numbers, "e o (s p w) -> p e o s w", p=PLANES, w=WORDS)
    codes = spans[0].int()
    for plane in range(1, PLANES):
        codes |= spans[plane].int() << 4 * plane
    return codes.flatten(-2)


def _unpacked_codes(codes: Tensor) -> Tensor:
    spans = rearrange(codes, "e o (s w) -> e o s w", w=WORDS)
    numbers = torch.stack([(spans >> 4 * plane & 15).byte() for plane in range(PLANES)], dim=-2)
    return numbers.flatten(-3)


def _values(weights: Weights) -> Tensor:
    values = weights.values
    if weights.kind == "int8":
        magnitude = values.abs().byte()
        signed = torch.where(values < 0, magnitude | _SIGN, magnitude)
        return _interleaved(_filled(signed, SPAN // 2, 0), 2)
    if weights.kind == "int4":
        return _interleaved(_filled(values, SPAN // 4, _ZERO_NIBBLES), 1)
    return values.contiguous().view(torch.int32)


def _interleaved(bytes_EOB: Tensor, group: int) -> Tensor:
    """Bytes, `group` of them a group, with those of a word's groups side by side."""
    shape = {"w": WORDS, "p": GROUP // group, "g": group, "q": 2 * group}
    order = rearrange(bytes_EOB, "e o (s q p w g) -> e o (s q w p g)", **shape)
    return order.contiguous().view(torch.int32)


def _stored_values(weights: Weights) -> Tensor:
    kept = weights.columns // 2
    if weights.kind == "int8":
        signed = _in_order(weights.values, 2)[..., :kept]
        magnitude = (signed & (_SIGN - 1)).to(torch.int8)
        return torch.where(signed >= _SIGN, -magnitude, magnitude)
    if weights.kind == "int4":
        values = _in_order(weights.values, 1)[..., : -(-kept // 2)]
        return values.contiguous()
    dtype = torch.bfloat16 if weights.kind == "bf16" else torch.float16
    return weights.values.view(dtype)


def _in_order(words: Tensor, group: int) -> Tensor:
    shape = {"w": WORDS, "p": GROUP // group, "g": group, "q": 2 * group}
    return rearrange(words.view(torch.uint8), "e o (s q w p g) -> e o (s q p w g)", **shape)
