"""The compiled gate: what a router does at one new token of each sequence, in one call.

A plain C library called through ctypes, whose specification is the plain way of `Router` and
`Step`. It works on the CPU and without gradients; everywhere else, and where there was no compiler,
the plain way is taken.

B batch, S sequence, D model width, E experts, A active experts, H horizons, C channels of all routers' states.
"""

import ctypes
import functools
import math
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from moiety.compiled import loaded
from moiety.routers.spec import RouterSpec
from moiety.routers.states import Ahead

FILE = Path(__file__).with_name("_gates.so")
LARGEST = 2**20
"""Multiply-adds up to which one thread does a gate; chosen so that threads would hardly help."""
_KINDS = {"softmax": 0, "sigmoid": 1, "sequence": 2}
_DTYPES = (torch.float32, torch.bfloat16)


class Shape(ctypes.Structure):
    """`Gate` of kernel/gate.cpp: all that does not change about a router."""

    _fields_ = (
        *((name, c_int64) for name in ("width", "experts", "active", "horizons", "start")),
        ("kind", c_int32),
        ("absolute", c_int32),
        ("mass", c_float),
    )


class Memory(ctypes.Structure):
    """`Memory` of kernel/gate.cpp: rows of states before and after one token of each sequence."""

    _fields_ = (
        *((name, c_void_p) for name in ("past", "rates", "now", "position", "kept")),
        *((name, c_int64) for name in ("step", "position_step", "kept_step", "kept_bytes")),
        ("channels", c_int64),
        ("fresh", c_int64),
    )


class _Input(ctypes.Structure):
    _fields_ = (
        ("hidden", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("batch", c_int64),
        ("bf16", c_int32),
        ("weight_bf16", c_int32),
        ("epsilon", c_float),
    )


def shape_of(spec: RouterSpec, width: int, experts: int, start: int | None) -> Shape | None:
    """A router as the library knows it; None for kinds that learn nothing."""
    if spec.kind not in _KINDS:
        return None
    mass = math.inf if spec.mass is None else spec.mass
    sizes = (width, experts, spec.active(experts), len(spec.horizons), start or 0)
    return Shape(*sizes, _KINDS[spec.kind], spec.score == "absolute", mass)


def memory_of(
    ahead: Ahead,
    rate_H: Tensor,
    channels: int,
    position_B1: Tensor | None,
    mask_BS: Tensor | None,
) -> Memory:
    """The rows of one step, all of which must outlive what is returned.

    Positions are int64. The last column of `mask_BS`, of any integer type or bool, is 0 for padding.
    """
    position = last = None
    position_step = mask_step = size = 0
    if position_B1 is not None:
        position, position_step = position_B1.data_ptr(), position_B1.stride(0)
    if mask_BS is not None:
        mask_step, column = mask_BS.stride()
        rows, columns = mask_BS.shape
        size = mask_BS.itemsize
        last = mask_BS.data_ptr() + (columns - 1) * column * size
        mask_step = 0 if rows == 1 else mask_step
    rows = ahead.past, rate_H.data_ptr(), ahead.next, position, last
    return Memory(*rows, ahead.step, position_step, mask_step, size, channels, 1)


def fits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the library can work on hidden states (B, 1, D) with a gate's weight (E, W)."""
    if type(hidden) is not Tensor or type(weight) is not Parameter:
        return False
    if not (hidden.is_cpu and weight.is_cpu):
        return False
    if hidden.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return False
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return False
    shape = hidden.shape
    return len(shape) == 3 and shape[1] == 1 and shape[0] * weight.numel() <= LARGEST


class Library:
    """The loaded library. Raises OSError when it cannot be loaded."""

    def __init__(self, path: Path = FILE) -> None:
        self._gate = ctypes.CDLL(str(path)).moiety_gate
        structures = POINTER(Shape), POINTER(Memory), POINTER(_Input)
        self._gate.argtypes = [*structures, c_void_p, c_void_p, c_void_p]

    def route(
        self,
        shape: Shape,
        memory: Memory | None,
        hidden: Tensor,
        weight: Tensor,
        bias_E: Tensor | None,
        epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, 1, D) to logits (B, E), weights and experts (B, A).

        `memory` is None for routers that remember nothing; of others, its new row is written.
        """
        hidden, weight, batch = hidden.contiguous(), weight.contiguous(), len(hidden)
        logits_BE = hidden.new_empty((batch, shape.experts), dtype=torch.float32)
        weights_BA = hidden.new_empty((batch, shape.active), dtype=torch.float32)
        experts_BA = hidden.new_empty((batch, shape.active), dtype=torch.int64)
        given = _Input(
            hidden.data_ptr(),
            weight.data_ptr(),
            None if bias_E is None else bias_E.data_ptr(),
            batch,
            hidden.dtype == torch.bfloat16,
            weight.dtype == torch.bfloat16,
            epsilon,
        )
        outputs = logits_BE.data_ptr(), weights_BA.data_ptr(), experts_BA.data_ptr()
        if self._gate(shape, memory, given, *outputs):
            raise MemoryError("no memory for a router's intermediate results")
        return logits_BE, weights_BA, experts_BA


@functools.cache
def library() -> Library | None:
    """The library, or None where it was not built.

    InputError where it was built from other sources than these.
    """
    return loaded(FILE, Library, "a compiled gate")
