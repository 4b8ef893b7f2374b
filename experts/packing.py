"""The packed format, version 1: kept values and a bit mask for each matrix.

A matrix (out, in) under pattern N:M is stored as `weight` (out, in·N/M), the kept values in
column order, and `weight_mask` (out, ceil(in/8)) uint8, one bit a column, lowest bit first.
For 2:4 in bf16 that is 9/16 of the dense bytes. O/I out/in features, K kept values a row,
B mask bytes a row.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from moiety.errors import InputError
from moiety.experts.kernels import reference
from moiety.experts.pattern import Pattern

VERSION = 1
VALUE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Packed:
    """One packed matrix."""

    values_OK: Tensor
    mask_OB: Tensor
    in_features: int

    def dense(self) -> Tensor:
        """The dense matrix (O, I), zeros where nothing is kept."""
        return reference.expand(self.values_OK, self.mask_OB, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of values and mask."""
        return self.values_OK.nbytes + self.mask_OB.nbytes


def pack(weight_OI: Tensor, pattern: Pattern, dtype: torch.dtype | None = None) -> Packed:
    """Pack a matrix that already follows `pattern`.

    Groups with fewer non-zeros than the pattern keeps are filled with explicit zeros, lowest
    columns first. Raises InputError when a group has more non-zeros, or one is not finite.
    """
    pattern.check_width(weight_OI.shape[1])
    if not bool(weight_OI.isfinite().all()):
        raise InputError("expected finite weights, but the matrix holds NaN or infinity")
    if not pattern.holds(weight_OI):
        raise InputError(
            f"expected a matrix that follows pattern {pattern}, but some group has more than "
            f"{pattern.kept} non-zeros; prune it first"
        )
    mask_OI = pattern.mask((weight_OI != 0).to(torch.uint8))
    values_OK = weight_OI[mask_OI].reshape(weight_OI.shape[0], -1)
    return Packed(
        values_OK.to(dtype or weight_OI.dtype).contiguous(),
        reference.pack_bits(mask_OI),
        weight_OI.shape[1],
    )


def check(name: str, values: Tensor, mask: Tensor, in_features: int, pattern: Pattern) -> None:
    """Raise InputError unless values (..., O, K) and mask (..., O, B) are a valid packed tensor.

    Checks dtypes, shapes, finite values, that every group keeps exactly the pattern's count and
    that padding bits are 0.
    """
    expected_values = (*mask.shape[:-1], pattern.kept_columns(in_features))
    expected_mask = (*values.shape[:-1], -(-in_features // 8))
    if tuple(values.shape) != expected_values or tuple(mask.shape) != expected_mask:
        raise InputError(
            f"{name}: expected values {expected_values} and mask {expected_mask} for pattern "
            f"{pattern}, but they are {tuple(values.shape)} and {tuple(mask.shape)}"
        )
    if values.dtype not in VALUE_DTYPES.values() or mask.dtype != torch.uint8:
        raise InputError(
            f"{name}: expected values in {', '.join(VALUE_DTYPES)} and a uint8 mask, "
            f"but they are {values.dtype} and {mask.dtype}"
        )
    if not bool(values.isfinite().all()):
        raise InputError(f"{name}: expected finite values, but some are NaN or infinite")
    _check_counts(name, mask, in_features, pattern)


def _check_counts(name: str, mask: Tensor, in_features: int, pattern: Pattern) -> None:
    bits = reference.unpack_bits(mask, mask.shape[-1] * 8)
    kept = rearrange(bits[..., :in_features], "... (g m) -> ... g m", m=pattern.group).sum(-1)
    if not bool((kept == pattern.kept).all()) or bool(bits[..., in_features:].any()):
        raise InputError(
            f"{name}: expected exactly {pattern} in every group of its mask, but it differs; "
            "the file is damaged or not of this format"
        )
