"""A stack of sparse matrices as the ops take it, in any layout.

E matrices of a stack, O/I out/in features, K kept values a row, B mask bytes a row, G scales a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moiety.experts.kernels.reference import SCALE_COLUMNS

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "int4": torch.uint8,
}
INTEGERS = ("int8", "int4")
KIND_OF = {dtype: kind for kind, dtype in DTYPES.items()}
# bf16 without loss in twelve bits, in the CPU kernels' tiles only.
BF12 = "bf12"


class Weights(NamedTuple):
    """Matrices (rows, columns), all of one pattern and one kind of values.

    Rows layout, as they are stored: `values` (E, O, K) or (E, n), `mask` (E, O, B) and, for
    integers, `scale` (E, O, G). Tiles, the CPU kernels' own layout for 2:4: `values` are bytes
    (E, ...), `mask` and `scale` None. Planes, the GPU kernels' own: all are 32-bit words, `mask`
    holds pattern numbers (`cuda/layout.py`). `starts` (E, O + 1), optional, says where each row of flat values
    begins, so that the kernels need not count the mask's bits. Make them with `packed` and `tiled`.
    """

    values: Tensor
    mask: Tensor | None
    scale: Tensor | None
    starts: Tensor | None
    rows: int
    columns: int
    kind: str

    @property
    def stack(self) -> int:
        """Matrices in the stack."""
        return self.values.shape[0]

    @property
    def layout(self) -> str:
        """`rows`, `tiled` (the CPU kernels' own) or `planes` (the GPU kernels' own)."""
        if self.mask is None:
            return "tiled"
        return "planes" if self.mask.dtype == torch.int32 else "rows"

    @property
    def stored_kind(self) -> str:
        """The kind of the values where they are stored: tiles may hold bf16 as `bf12`."""
        return "bf16" if self.kind == BF12 else self.kind

    @property
    def is_tiled(self) -> bool:
        """Whether these are the CPU kernels' tiles."""
        return self.mask is None

    @property
    def is_planes(self) -> bool:
        """Whether these are the GPU kernels' planes."""
        return self.layout == "planes"

    def one(self, which: int) -> "Weights":
        """A stack of just one of the matrices."""

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[which : which + 1]

        return self._replace(
            values=self.values[which : which + 1],
            mask=of(self.mask),
            scale=of(self.scale),
            starts=of(self.starts),
        )

    def regrouped(self, stack: int) -> "Weights":
        """The same rows as another number of matrices: gate and up apart, or together again.

        For values (E, O, K) in the rows layout.
        """
        rows = self.stack * self.rows // stack

        def regroup(tensor: Tensor) -> Tensor:
            return tensor.reshape(stack, rows, -1)

        mask = None if self.mask is None else regroup(self.mask)
        scale = None if self.scale is None else regroup(self.scale)
        return Weights(regroup(self.values), mask, scale, None, rows, self.columns, self.kind)


def packed(
    values: Tensor, mask_EOB: Tensor, in_features: int, scale_EOG: Tensor | None = None
) -> Weights:
    """Check tensors of the packed format and put them together; one matrix becomes a stack of one.

    Raises ValueError when shapes or dtypes do not fit each other.
    """
    kind = KIND_OF.get(values.dtype)
    if kind is None or mask_EOB.dtype != torch.uint8:
        raise ValueError(
            f"expected packed values in {', '.join(map(str, KIND_OF))} and a torch.uint8 mask, "
            f"but they are {values.dtype} and {mask_EOB.dtype}"
        )
    if mask_EOB.dim() not in (2, 3) or mask_EOB.shape[-1] != -(-in_features // 8):
        raise ValueError(
            f"expected a mask of 2 or 3 dimensions with {-(-in_features // 8)} bytes a row for "
            f"{in_features} columns, but its shape is {tuple(mask_EOB.shape)}"
        )
    if mask_EOB.dim() == 2:
        values, mask_EOB = values[None], mask_EOB[None]
        scale_EOG = None if scale_EOG is None else scale_EOG[None]
    stack, rows = mask_EOB.shape[0], mask_EOB.shape[1]
    flat = values.dim() == 2
    most = in_features * (rows if flat else 1)
    if values.shape[:-1] != ((stack,) if flat else (stack, rows)) or values.shape[-1] > most:
        raise ValueError(
            f"expected values of shape {(stack, rows, 'kept')} or {(stack, 'kept')} for a mask of "
            f"shape {tuple(mask_EOB.shape)}, but it is {tuple(values.shape)}"
        )
    groups = -(-in_features // SCALE_COLUMNS)
    _check_scale(kind, scale_EOG, (stack, rows, groups))
    return Weights(values, mask_EOB, scale_EOG, None, rows, in_features, kind)


def _check_scale(kind: str, scale: Tensor | None, expected: tuple[int, ...]) -> None:
    if kind not in INTEGERS:
        if scale is not None:
            raise ValueError(f"expected no scale for {kind} values, but there is one")
    elif scale is None or scale.dtype != torch.bfloat16 or tuple(scale.shape) != expected:
        came = "there is none" if scale is None else f"it is {scale.dtype} {tuple(scale.shape)}"
        raise ValueError(f"expected a bfloat16 scale of shape {expected} for {kind}, but {came}")


def contiguous(weights: Weights) -> Weights:
    """The same with every tensor contiguous, as the compiled kernels read them."""
    values, mask, scale, *_ = weights
    if mask is None and values.is_contiguous():
        return weights
    return weights._replace(
        values=values.contiguous(),
        mask=None if mask is None else mask.contiguous(),
        scale=None if scale is None else scale.contiguous(),
    )
