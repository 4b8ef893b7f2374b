"""The compiled CPU kernels: a plain C library, found beside this file and called through ctypes.

Importing torch first matters: the library then shares torch's OpenMP runtime instead of bringing
a second one, whose threads would spin against torch's.

T tokens, A active experts, O/I out/in features.
"""

import ctypes
import functools
from ctypes import POINTER, byref, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moiety.compiled import loaded
from moiety.errors import InputError
from moiety.experts.kernels.weights import BF12, DTYPES, INTEGERS, KIND_OF, Weights

FILE = Path(__file__).with_name("_cpu.so")
_KIND_CODE = {kind: code for code, kind in enumerate((*DTYPES, BF12))}
_ACTIVATION_CODE = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3}
_BAD_MASK, _NO_MEMORY = 1, 2
_ROWS, _TILES, _DENSE = 0, 1, 2
_TILE_ROWS = 16
# Elements of a matrix whose memory, where it is not there yet, takes as long to get as to fill.
_LARGE = 1 << 21
KERNEL_DTYPES = (torch.bfloat16, torch.float32)


class Isa(IntEnum):
    """Instruction sets with kernels of their own, each with what those before it have."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4


class _Matrix(ctypes.Structure):
    """`Matrix` of cpu/format.h."""

    _fields_ = (
        ("values", c_void_p),
        ("mask", c_void_p),
        ("scale", c_void_p),
        ("starts", c_void_p),
        *((name, c_int64) for name in ("count", "rows", "columns", "kept", "total")),
        *((f"{name}_step", c_int64) for name in ("values", "mask", "scale", "starts")),
        ("kind", c_int32),
        ("layout", c_int32),
    )


class _Tokens(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("count", c_int64), ("width", c_int64), ("bf16", c_int32))


class _Routes(ctypes.Structure):
    _fields_ = (("experts", c_void_p), ("weights", c_void_p), ("active", c_int64))


class Library:
    """The loaded library. Raises OSError when it cannot be loaded."""

    def __init__(self, path: Path = FILE) -> None:
        self._functions = ctypes.CDLL(str(path))
        self._forward = self._functions.moiety_forward
        self._forward.argtypes = [c_int32, c_int32, *[c_void_p] * 2, c_int32, *[c_void_p] * 4]
        self._functions.moiety_tile_bytes.restype = c_int64
        self._functions.moiety_tile_bytes.argtypes = [c_int32, c_int64, c_int64]
        matrix = POINTER(_Matrix)
        self._functions.moiety_tile.argtypes = [matrix, c_int32, c_void_p, c_int64, c_void_p]
        self._functions.moiety_bf12_bytes.restype = c_int64
        self._functions.moiety_bf12_bytes.argtypes = [matrix, c_int32, c_void_p]
        self._functions.moiety_untile.argtypes = [matrix, c_int32, *[c_void_p] * 3]
        self._functions.moiety_starts.argtypes = [matrix, c_int32, c_void_p]
        self._functions.moiety_dense.argtypes = [
            c_int32,
            matrix,
            c_int64,
            c_int32,
            c_int32,
            c_void_p,
        ]
        self._functions.moiety_large_pages.argtypes = [c_void_p, c_int64]
        self._functions.moiety_large_pages.restype = None
        self.supported = tuple(isa for isa in Isa if self._functions.moiety_has(isa))
        self.best = Isa(self._functions.moiety_best())

    def tile(self, weights: Weights) -> Weights:
        """Tiles of 2:4 matrices in the rows layout; ValueError where a mask is not 2:4."""
        matrix, _kept = self._matrix(weights)
        kind, size, apart = weights.kind, 0, None
        if kind == "bf16":
            apart = torch.empty(weights.stack, -(-weights.rows // _TILE_ROWS), dtype=torch.int64)
            arguments = (byref(matrix), _threads(), apart.data_ptr())
            size = self._functions.moiety_bf12_bytes(*arguments)
        if size:
            kind = BF12
        else:
            code, apart = _KIND_CODE[kind], None
            size = self._functions.moiety_tile_bytes(code, weights.rows, weights.columns)
        tiles = torch.empty(weights.stack, size, dtype=torch.uint8)
        arguments = (byref(matrix), _threads(), _pointer(apart), size, tiles.data_ptr())
        _check(self._functions.moiety_tile(*arguments))
        return Weights(tiles, None, None, None, weights.rows, weights.columns, kind)

    def untile(self, weights: Weights) -> Weights:
        """The rows layout again, exactly as it was."""
        stack, kept = (weights.stack, weights.rows), weights.columns // 2
        kind = weights.stored_kind
        kept = -(-kept // 2) if kind == "int4" else kept
        values = torch.empty(*stack, kept, dtype=DTYPES[kind])
        mask = torch.empty(*stack, -(-weights.columns // 8), dtype=torch.uint8)
        scale = None
        if weights.kind in INTEGERS:
            scale = torch.empty(*stack, -(-weights.columns // 128), dtype=torch.bfloat16)
        matrix, _kept = self._matrix(weights)
        pointers = (_pointer(tensor) for tensor in (values, mask, scale))
        _check(self._functions.moiety_untile(byref(matrix), _threads(), *pointers))
        return Weights(values, mask, scale, None, weights.rows, weights.columns, kind)

    def starts(self, weights: Weights) -> Tensor:
        """Where each row of flat values begins, and the end (E, O + 1)."""
        _, starts = self._matrix(weights._replace(starts=None))
        assert starts is not None
        return starts

    def expand(self, weights: Weights, which: int, dtype: torch.dtype) -> Tensor:
        """One dense matrix (O, I) in bf16 or fp32; ValueError where mask and values disagree."""
        dense_OI = self.empty(weights.rows, weights.columns, dtype)
        matrix, _kept = self._matrix(weights)
        bf16 = dtype == torch.bfloat16
        arguments = (self.best, byref(matrix), which, _threads(), bf16, dense_OI.data_ptr())
        _check(self._functions.moiety_dense(*arguments))
        return dense_OI

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A matrix on the CPU that is still to be filled, in large pages where it is large."""
        matrix = _empty(rows, columns, dtype=dtype, device=_CPU)
        if rows * columns >= _LARGE:
            self._functions.moiety_large_pages(matrix.data_ptr(), matrix.nbytes)
        return matrix

    def forward(
        self,
        input_TI: Tensor,
        down: Weights,
        *,
        gate_up: Weights | None = None,
        activation: str = "silu",
        experts_TA: Tensor | None = None,
        weights_TA: Tensor | None = None,
        base_TO: Tensor | None = None,
        isa: Isa | None = None,
        threads: int | None = None,
    ) -> Tensor:
        """Products (T, O) of tokens, contiguous and bf16 or fp32, in their dtype.

        Without `experts_TA` (int64) every token goes to the first matrix. With it and
        `weights_TA` (fp32), a token's result is the weighted sum over its matrices, on top of
        `base_TO`. With `gate_up`, the tokens first go through `activation(gate) * up`. ValueError
        where a mask and its values disagree.
        """
        routes, (matrix, _kept), above = None, self._matrix(down), None
        if experts_TA is not None and weights_TA is not None:
            routes = _Routes(experts_TA.data_ptr(), weights_TA.data_ptr(), experts_TA.shape[1])
        if gate_up is not None:
            above = self._matrix(gate_up)
        return self._run(
            input_TI,
            matrix,
            gate_up=byref(above[0]) if above else None,
            activation=_ACTIVATION_CODE[activation],
            routes=byref(routes) if routes else None,
            base=_pointer(base_TO),
            isa=isa,
            threads=threads,
        )

    def linear(self, input_TI: Tensor, tiles: Weights) -> Tensor:
        """`x Wᵀ` (T, O) for one tiled matrix, in the input's dtype; the shortest way to it.

        Tokens and tiles are contiguous, tokens of `KERNEL_DTYPES`.
        """
        values, _, _, _, rows, columns, kind = tiles
        stack, each = values.shape
        matrix = _as_given(values.data_ptr(), each, stack, rows, columns, kind, _TILES)
        return self._run(input_TI, matrix)

    def dense_linear(
        self,
        input_TI: Tensor,
        weight_OI: Tensor,
        *,
        isa: Isa | None = None,
        threads: int | None = None,
    ) -> Tensor:
        """`x Wᵀ` (T, O) of a dense matrix, in the input's dtype; both are contiguous, bf16 or fp32.

        For few tokens: with many, torch's own product is faster. InputError without AVX2.
        """
        if (self.best if isa is None else isa) == Isa.PORTABLE:
            raise InputError("expected a CPU with AVX2 for dense products, but it has none")
        fits = input_TI.dim() == weight_OI.dim() == 2 and input_TI.shape[1] == weight_OI.shape[1]
        if not fits or weight_OI.dtype not in KERNEL_DTYPES:
            raise InputError(
                f"expected a bf16 or fp32 matrix for tokens of shape {tuple(input_TI.shape)}, "
                f"but it is {weight_OI.dtype} of shape {tuple(weight_OI.shape)}"
            )
        shape = (1, *weight_OI.shape)
        kind = KIND_OF[weight_OI.dtype]
        matrix = _as_given(weight_OI.data_ptr(), weight_OI.nbytes, *shape, kind, _DENSE)
        return self._run(input_TI, matrix, isa=isa, threads=threads)

    def _run(
        self,
        input_TI: Tensor,
        matrix: _Matrix,
        *,
        gate_up: Any = None,
        activation: int = 0,
        routes: Any = None,
        base: int | None = None,
        isa: Isa | None = None,
        threads: int | None = None,
    ) -> Tensor:
        if isa is None:
            isa = self.best
        elif isa not in self.supported:
            raise InputError(f"expected a CPU with {isa.name}, but it has {self.best.name} at best")
        count, width = input_TI.shape
        rows = matrix.rows
        if count * rows < _LARGE:
            output_TO = input_TI.new_empty(count, rows)
        else:
            output_TO = self.empty(count, rows, input_TI.dtype)
        tokens = _Tokens(input_TI.data_ptr(), count, width, input_TI.dtype == _BF16)
        status = self._forward(
            isa,
            threads or _threads(),
            gate_up,
            byref(matrix),
            activation,
            byref(tokens),
            routes,
            base,
            output_TO.data_ptr(),
        )
        if status:
            _check(status)
        return output_TO

    def _matrix(self, weights: Weights) -> tuple[_Matrix, Tensor | None]:
        """The C structure, and what must stay alive as long as it."""
        values, mask, scale = weights.values, weights.mask, weights.scale
        if mask is None:
            stack, each = values.shape
            shape = (stack, weights.rows, weights.columns)
            return _as_given(values.data_ptr(), each, *shape, weights.kind, _TILES), None
        each = values.numel() // max(1, len(values))
        matrix = _Matrix(
            values=values.data_ptr(),
            mask=mask.data_ptr(),
            scale=_pointer(scale),
            count=weights.stack,
            rows=weights.rows,
            columns=weights.columns,
            kept=values.shape[-1],
            total=2 * each if weights.kind == "int4" else each,
            values_step=each * values.element_size(),
            mask_step=mask[0].numel(),
            scale_step=0 if scale is None else scale[0].numel(),
            starts_step=weights.rows + 1,
            kind=_KIND_CODE[weights.kind],
            layout=_ROWS,
        )
        if values.dim() == 3:
            if weights.kind == "int4":
                matrix.kept = _kept(mask, values.shape[-1])
            return matrix, None
        starts = weights.starts
        if starts is None:
            starts = torch.empty(weights.stack, weights.rows + 1, dtype=torch.int64)
            _check(self._functions.moiety_starts(byref(matrix), _threads(), starts.data_ptr()))
        matrix.starts = starts.data_ptr()
        return matrix, starts


@functools.lru_cache(4096)
def _as_given(
    data: int, each: int, stack: int, rows: int, columns: int, kind: str, layout: int
) -> _Matrix:
    """The C structure of tiles or dense matrices, which only depends on these numbers."""
    return _Matrix(
        values=data,
        count=stack,
        rows=rows,
        columns=columns,
        kept=columns // 2,
        total=each,
        values_step=each,
        kind=_KIND_CODE[kind],
        layout=layout,
    )


def _kept(mask: Tensor, row_bytes: int) -> int:
    """Kept values of the first row: two int4 share a byte, so their bytes do not tell."""
    row = mask.reshape(-1, mask.shape[-1])[0]
    kept = sum(int(byte).bit_count() for byte in row.tolist())
    _check(_BAD_MASK if -(-kept // 2) != row_bytes else 0)
    return kept


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# At hand, because torch's namespace is large and a call between others finds it out of the caches.
_threads, _empty = torch.get_num_threads, torch.empty
_BF16, _CPU = torch.bfloat16, torch.device("cpu")


def _check(status: int) -> None:
    if status == _BAD_MASK:
        raise InputError(
            "expected a mask that keeps exactly the stored values, but it differs; "
            "the packed weights are damaged"
        )
    if status == _NO_MEMORY:
        raise MemoryError("no memory for the sparse kernels' intermediate results")
    if status:
        raise InputError("expected 2:4 matrices for tiles, but they are of another pattern")


@functools.cache
def library() -> Library | None:
    """The library, or None where it was not built.

    InputError where it was built from other sources than these.
    """
    return loaded(FILE, Library, "compiled kernels")


def description() -> str:
    """One line that says which kernels work on the CPU."""
    found = library()
    if found is None:
        return (
            "PyTorch reference kernels (slow): the compiled ones are not built; "
            "install a C++ compiler and moiety again"
        )
    return f"compiled kernels, {found.best.name.replace('_', '-')}"
