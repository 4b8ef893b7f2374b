"""cuSPARSELt's products with 2:4 matrices, for prompts: sparse tensor cores, one matrix at a time.

cuSPARSELt wants a matrix as its kept values, just as planes hold them, followed by metadata of its
own. So planes with room for that metadata behind each matrix's values serve both: 10 bits a weight
instead of 9.

E matrices, O/I out/in features, T tokens.
"""

# torch's interface to cuSPARSELt is private.
# pyright: reportPrivateImportUsage=false

import torch
from torch import Tensor
from torch.nn import functional

from moiety.experts.kernels import reference
from moiety.experts.kernels.cuda import layout
from moiety.experts.kernels.weights import Weights

_MULTIPLE = 32


def with_metadata(weights: Weights, dense: Tensor) -> Weights:
    """Planes of 16-bit values with cuSPARSELt's metadata; as they were where it cannot be.

    `dense` (E, O, I) are the same matrices. They stay as they are without cuSPARSELt, for integers,
    for sizes it does not take, or if it arranged the values in another way.
    """
    stack, rows, columns = dense.shape
    fits = weights.kind in ("bf16", "fp16") and rows % _MULTIPLE == columns % _MULTIPLE == 0
    if not fits or not torch.backends.cusparselt.is_available():
        return weights
    stored_mask = layout.stored(weights).mask
    assert stored_mask is not None
    words = rows * columns // 4
    both = torch.empty(stack, words * 9 // 8, dtype=torch.int32, device=dense.device)
    for which in range(stack):
        found = _compressed(weights.values[which], stored_mask[which], dense[which])
        if found is None or found.numel() != both.shape[1]:
            return weights
        both[which] = found
    shape, steps = (stack, rows, columns // 4), (both.shape[1], columns // 4, 1)
    return weights._replace(values=both.as_strided(shape, steps))


def _compressed(values_OK: Tensor, mask_OB: Tensor, dense_OI: Tensor) -> Tensor | None:
    """The words of one compressed matrix, or None if its values are not those of the planes.

    cuSPARSELt finds the kept columns by their not being zero, so zeros among the kept values stand
    in as the smallest number until it has.
    """
    least = torch.finfo(dense_OI.dtype).tiny
    kept_OI = reference.unpack_bits(mask_OB, dense_OI.shape[1])
    marked_OI = dense_OI.masked_fill(kept_OI & (dense_OI == 0), least)
    words = torch._cslt_compress(marked_OI).reshape(-1).view(torch.int32)
    values = values_OK.reshape(-1)
    ours = values.view(dense_OI.dtype)
    theirs = words[: values.numel()].view(dense_OI.dtype)
    if not torch.equal(theirs, ours.masked_fill(ours == 0, least)):
        return None
    words[: values.numel()] = values
    return words


def compressed(weights: Weights, which: int) -> Tensor | None:
    """One matrix as cuSPARSELt takes it (O, 9 I / 16), or None where its metadata is not there."""
    step = weights.rows * weights.columns * 9 // 32
    if weights.kind not in ("bf16", "fp16") or weights.values.stride(0) != step:
        return None
    width = weights.columns * 9 // 32
    start = weights.values.storage_offset() + which * step
    words = weights.values.as_strided((weights.rows, width), (width, 1), start)
    return words.view(torch.bfloat16 if weights.kind == "bf16" else torch.float16)


class Products:
    """cuSPARSELt's products, its algorithm searched for once a shape and power of two of tokens."""

    def __init__(self) -> None:
        self._algorithms: dict[tuple[object, ...], int] = {}

    def __call__(self, input_TI: Tensor, matrix: Tensor) -> Tensor:
        """`input @ weightᵀ` (T, O) with a compressed matrix."""
        tokens = len(input_TI)
        tokens_IT = functional.pad(input_TI, (0, 0, 0, -tokens % 16)).T
        size = 1 << (tokens - 1).bit_length()
        key = (matrix.device, matrix.dtype, tuple(matrix.shape), size)
        if key not in self._algorithms:
            self._algorithms[key] = _searched(matrix, tokens_IT)
        algorithm = self._algorithms[key]
        output = torch._cslt_sparse_mm(matrix, tokens_IT, transpose_result=True, alg_id=algorithm)
        return output[:tokens]


def _searched(matrix: Tensor, tokens_IT: Tensor) -> int:
    private = getattr(torch._C, "_cusparselt", None)
    if hasattr(private, "mm_search"):
        found = private.mm_search(matrix, tokens_IT, None, None, None, True)  # pyright: ignore[reportOptionalMemberAccess]
    else:
        found = torch._cslt_sparse_mm_search(matrix, tokens_IT, transpose_result=True)
    return found[0] if isinstance(found, tuple) else found
