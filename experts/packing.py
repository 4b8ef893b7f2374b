"""The packed format, version 1: kept values and a bit mask for each matrix.

A matrix (O, I) is stored as `weight`, its kept values in row-major order, and `weight_mask`
(O, ceil(I/8)) uint8, one bit a column, lowest bit first. Under N:M the values are (O, I·N/M),
under a density they are flat. bf16, fp16 and fp32 values are the weights; int8 ones and int4 ones
(two a byte, low half first, each stored 8 higher) are multiplied by `weight_scale` (O, ceil(I/128))
bf16, one scale a row for each 128 columns of the dense matrix. docs/packed-format.md has the tables.

O/I out/in features, B mask bytes a row, G scales a row.
"""

from dataclasses import dataclass
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from moiety.errors import InputError
from moiety.experts.kernels import reference
from moiety.experts.kernels.weights import DTYPES
from moiety.experts.pattern import Pattern

VERSION = 1
VALUES = tuple(DTYPES)
LARGEST_CODE = {"int8": 127, "int4": 7}
FLOATS = tuple(kind for kind in VALUES if kind not in LARGEST_CODE)


@dataclass(frozen=True)
class Packed:
    """One packed matrix (`out_features`, `in_features`); `scale_OG` only for integer values."""

    values: Tensor
    mask_OB: Tensor
    scale_OG: Tensor | None
    out_features: int
    in_features: int

    def dense(self) -> Tensor:
        """The dense matrix (O, I), zeros where nothing is kept; fp32 for integer values."""
        return reference.expand(self.values, self.mask_OB, self.in_features, self.scale_OG)

    @property
    def nbytes(self) -> int:
        """Bytes of values, mask and scales."""
        return sum(tensor.nbytes for tensor in self.tensors("").values())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What is stored for a matrix called `name`, such as `model.layers.0.mlp.up_proj.weight`."""
        stored = {name: self.values, f"{name}_mask": self.mask_OB}
        return stored if self.scale_OG is None else {**stored, f"{name}_scale": self.scale_OG}


def stored_shape(
    pattern: Pattern, values: str | None, out_features: int, in_features: int
) -> tuple[int, ...]:
    """Shape of the stored values of a matrix (O, I); `values` None for floating-point ones."""
    *rows, kept = pattern.values_shape(out_features, in_features)
    return (*rows, -(-kept // 2) if values == "int4" else kept)


def scale_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Shape of a matrix's scales: one a row for each 128 dense columns."""
    return out_features, -(-in_features // reference.SCALE_COLUMNS)


def packed_bytes(pattern: Pattern, values: str, out_features: int, in_features: int) -> int:
    """Bytes of one packed matrix (O, I): values, mask and scales."""
    kept = prod(stored_shape(pattern, values, out_features, in_features))
    scales = 2 * prod(scale_shape(out_features, in_features)) if values in LARGEST_CODE else 0
    return kept * DTYPES[values].itemsize + out_features * -(-in_features // 8) + scales


def pack(
    weight_OI: Tensor,
    pattern: Pattern,
    values: str = "bf16",
    scale_OG: Tensor | None = None,
    mask_OI: Tensor | None = None,
) -> Packed:
    """Pack a matrix that already follows `pattern`, its kept values stored as `values`.

    Without `mask_OI` the non-zeros are kept, and explicit zeros (lowest columns first) wherever
    the pattern keeps more. int8 and int4 need `scale_OG` (exact in bf16), of which every weight
    is then a multiple of at most 127 or 7. Raises InputError when a weight would be lost or
    changed by more than rounding to a floating-point type.
    """
    if values not in VALUES:
        raise InputError(f"values must be one of {', '.join(VALUES)}, but it is {values!r}")
    pattern.check_width(weight_OI.shape[1])
    if not _finite(weight_OI):
        raise InputError("expected finite weights, but the matrix holds NaN or infinity")
    if mask_OI is None:
        mask_OI, mask_OB = _kept(weight_OI, pattern)
    else:
        mask_OB = _given(weight_OI, pattern, mask_OI)
    shape = pattern.values_shape(*weight_OI.shape)
    if values in LARGEST_CODE:
        scale_OG = _bf16_scale(weight_OI, values, scale_OG)
        kept = _codes(weight_OI, values, scale_OG).masked_select(mask_OI).reshape(shape)
        kept = reference.pack_codes(kept) if values == "int4" else kept
    elif scale_OG is not None:
        raise InputError(f"expected no scale for values {values}, but one was given")
    else:
        kept = _rounded(weight_OI.masked_select(mask_OI).reshape(shape), values)
    return Packed(kept.contiguous(), mask_OB, scale_OG, *weight_OI.shape)


def _finite(tensor: Tensor) -> bool:
    lowest, highest = tensor.aminmax()
    return bool(lowest.isfinite() & highest.isfinite())


def _kept(weight_OI: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The mask of a pruned matrix and its bits: the non-zeros, and zeros up to the count."""
    nonzero_OI = weight_OI != 0
    mask_OB = reference.pack_bits(nonzero_OI)
    if _holds(mask_OB, weight_OI.shape[1], pattern):
        return nonzero_OI, mask_OB
    if not pattern.holds(weight_OI):
        where = "some group" if pattern.group else "it"
        count = pattern.kept or pattern.kept_columns(weight_OI.shape[1]) * weight_OI.shape[0]
        raise InputError(
            f"expected a matrix that follows pattern {pattern}, but {where} has more than {count} "
            "non-zeros; prune it first"
        )
    mask_OI = pattern.mask(nonzero_OI.to(torch.uint8), within="matrix")
    return mask_OI, reference.pack_bits(mask_OI)


def _given(weight_OI: Tensor, pattern: Pattern, mask_OI: Tensor) -> Tensor:
    if mask_OI.dtype != torch.bool or mask_OI.shape != weight_OI.shape:
        raise InputError(
            f"expected a boolean mask of shape {tuple(weight_OI.shape)}, "
            f"but it is {mask_OI.dtype} of shape {tuple(mask_OI.shape)}"
        )
    mask_OB = reference.pack_bits(mask_OI)
    if not _holds(mask_OB, weight_OI.shape[1], pattern):
        raise InputError(f"expected a mask that keeps exactly {pattern}, but it differs")
    if bool((weight_OI != 0).logical_and_(~mask_OI).any()):
        raise InputError("expected zeros outside the mask, but some weights there are not zero")
    return mask_OB


def _rounded(kept: Tensor, values: str) -> Tensor:
    rounded = kept.to(DTYPES[values])
    if not _finite(rounded):
        raise InputError(
            f"expected weights within the range of {values}, but the largest is "
            f"{float(kept.abs().max()):g}; store them as bf16 or fp32"
        )
    return rounded


def _bf16_scale(weight_OI: Tensor, values: str, scale_OG: Tensor | None) -> Tensor:
    expected = scale_shape(*weight_OI.shape)
    if scale_OG is None or tuple(scale_OG.shape) != expected:
        came = "there is none" if scale_OG is None else f"it has shape {tuple(scale_OG.shape)}"
        raise InputError(f"values {values} need a scale of shape {expected}, but {came}")
    rounded_OG = scale_OG.to(torch.bfloat16)
    if not bool((rounded_OG.to(scale_OG.dtype) == scale_OG).all()):
        raise InputError("expected scales that bf16 holds exactly, but some would be rounded")
    _check_scale("scale", rounded_OG)
    return rounded_OG.contiguous()


def _codes(weight_OI: Tensor, values: str, scale_OG: Tensor) -> Tensor:
    weight_OI = weight_OI.float()
    scale_OI = reference.spread_scale(scale_OG, weight_OI.shape[1])
    codes_OI = (weight_OI / scale_OI).round_()
    largest = LARGEST_CODE[values]
    if bool((codes_OI.abs() > largest).any()):
        raise InputError(
            f"expected weights of at most {largest} times their scale for {values}, but the "
            f"largest is {float(codes_OI.abs().max()):g} times its scale"
        )
    if not torch.allclose(codes_OI * scale_OI, weight_OI, rtol=1e-6, atol=0):
        raise InputError(
            f"expected every weight to be a whole multiple of its scale for {values}, but some "
            "are not; quantise the matrix first"
        )
    return codes_OI.to(torch.int8)


def check(
    name: str,
    values: Tensor,
    mask: Tensor,
    in_features: int,
    pattern: Pattern,
    scale: Tensor | None = None,
    kind: str | None = None,
) -> None:
    """Raise InputError that names the tensor unless it is validly packed.

    `values` (..., O, K) or (..., n), `mask` (..., O, B) and, for integers, `scale` (..., O, G)
    are one matrix or a stack of them; `kind` is one of VALUES, or None for any floating-point
    one. Checks dtypes, shapes, finite values, positive scales, the range of the codes, padding,
    and that exactly the pattern's count is kept.
    """
    _check_dtypes(name, values, mask, kind)
    _check_shapes(name, values, mask, in_features, pattern, kind)
    if kind in LARGEST_CODE:
        _check_integers(name, values, mask, in_features, pattern, scale, kind)
    elif scale is not None:
        raise InputError(f"{name}: expected no scale beside its floating-point values")
    elif not _finite(values):
        raise InputError(f"{name}: expected finite values, but some are NaN or infinite")
    padding = mask[..., -1].int() >> (in_features % 8 or 8)
    if bool(padding.any()) or not _holds(mask, in_features, pattern):
        where = "in every group" if pattern.group else "of each matrix"
        raise InputError(
            f"{name}: expected exactly {pattern} {where} in its mask, but it differs; "
            "the file is damaged or not of this format"
        )


def check_packed(name: str, packed: Packed, pattern: Pattern) -> None:
    """Raise InputError that names the tensor unless one packed matrix is valid; see `check`."""
    integers = {DTYPES[kind]: kind for kind in LARGEST_CODE}
    kind = integers.get(packed.values.dtype)
    check(name, packed.values, packed.mask_OB, packed.in_features, pattern, packed.scale_OG, kind)
    if packed.mask_OB.shape != (packed.out_features, packed.mask_OB.shape[-1]):
        raise InputError(
            f"{name}: expected {packed.out_features} rows, but its mask has "
            f"{tuple(packed.mask_OB.shape[:-1])}"
        )


def _check_dtypes(name: str, values: Tensor, mask: Tensor, kind: str | None) -> None:
    kinds = FLOATS if kind is None else (kind,)
    if values.dtype not in [DTYPES[kind] for kind in kinds] or mask.dtype != torch.uint8:
        raise InputError(
            f"{name}: expected values in {', '.join(kinds)} and a uint8 mask, "
            f"but they are {values.dtype} and {mask.dtype}"
        )


def _check_shapes(
    name: str, values: Tensor, mask: Tensor, in_features: int, pattern: Pattern, kind: str | None
) -> None:
    *stack, rows, _ = mask.shape if mask.dim() > 1 else (0, 0)
    expected_values = (*stack, *stored_shape(pattern, kind, rows, in_features))
    expected_mask = (*stack, rows, -(-in_features // 8))
    if tuple(values.shape) != expected_values or tuple(mask.shape) != expected_mask:
        raise InputError(
            f"{name}: expected values {expected_values} and mask {expected_mask} for pattern "
            f"{pattern}, but they are {tuple(values.shape)} and {tuple(mask.shape)}"
        )


def _check_integers(
    name: str,
    values: Tensor,
    mask: Tensor,
    in_features: int,
    pattern: Pattern,
    scale: Tensor | None,
    kind: str,
) -> None:
    *stack, rows, _ = mask.shape
    expected = (*stack, *scale_shape(rows, in_features))
    if scale is None or scale.dtype != torch.bfloat16 or tuple(scale.shape) != expected:
        came = "there is none" if scale is None else f"it is {scale.dtype} {tuple(scale.shape)}"
        raise InputError(f"{name}_scale: expected bf16 scales of shape {expected}, but {came}")
    _check_scale(f"{name}_scale", scale)
    _check_codes(name, values, pattern.values_shape(rows, in_features)[-1], kind)


def _check_scale(name: str, scale: Tensor) -> None:
    if not _finite(scale) or not bool((scale > 0).all()):
        raise InputError(f"{name}: expected finite scales above 0, but some are not")


def _check_codes(name: str, values: Tensor, kept: int, kind: str) -> None:
    codes = reference.unpack_codes(values) if kind == "int4" else values
    largest = LARGEST_CODE[kind]
    if bool((codes[..., :kept] < -largest).any()):
        raise InputError(
            f"{name}: expected {kind} values from -{largest} to {largest}, but some are lower"
        )
    if bool((codes[..., kept:] != -reference.CODE_OFFSET).any()):
        raise InputError(f"{name}: expected 0 in the unused half of a last byte, but it differs")


def _holds(mask: Tensor, in_features: int, pattern: Pattern) -> bool:
    """Whether every group, or every matrix, has exactly as many bits as the pattern keeps."""
    holds = _groups_hold if pattern.group else _matrices_hold
    return holds(mask, in_features, pattern)


def _matrices_hold(mask: Tensor, in_features: int, pattern: Pattern) -> bool:
    counts = _of_bytes(_bits_of_bytes().sum(-1).to(torch.uint8), mask)
    kept = pattern.kept_columns(in_features) * mask.shape[-2]
    return bool((counts.sum((-2, -1)) == kept).all())


def _groups_hold(mask: Tensor, in_features: int, pattern: Pattern) -> bool:
    size, whole = pattern.group, in_features // 8
    if 8 % size:
        return _bits_hold(reference.unpack_bits(mask, in_features), pattern)
    groups = rearrange(_bits_of_bytes(), "byte (g m) -> byte g m", m=size).sum(-1)
    valid = _of_bytes((groups == pattern.kept).all(-1), mask[..., :whole])
    rest = reference.unpack_bits(mask[..., whole:], in_features % 8)
    return bool(valid.all()) and _bits_hold(rest, pattern)


def _bits_hold(bits: Tensor, pattern: Pattern) -> bool:
    kept = rearrange(bits, "... (g m) -> ... g m", m=pattern.group).sum(-1)
    return bool((kept == pattern.kept).all())


def _bits_of_bytes() -> Tensor:
    """The eight bits of every byte value (256, 8), lowest first."""
    return torch.arange(256)[:, None] >> torch.arange(8) & 1


def _of_bytes(table: Tensor, mask: Tensor) -> Tensor:
    """The table's entry for every byte of a mask."""
    return table.to(mask.device).index_select(0, mask.reshape(-1).int()).view(mask.shape)
