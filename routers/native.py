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

from moiety.errors import InputError
from moiety.routers.spec import RouterSpec

FILE = Path(__file__).with_name("_gates.so")
LARGEST = 2**20
"""Multiply-adds up to which one thread and one call are faster than torch's threads and calls."""
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
        *((f"{name}_step", c_int64) for name in ("past", "now", "position", "kept")),
        ("kept_bytes", c_int64),
        ("channels", c_int64),
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
    past_BC: Tensor,
    now_BC: Tensor,
    rate_H: Tensor,
    position_B1: Tensor | None,
    mask_BS: Tensor | None,
) -> Memory:
    """The rows of one step, all of which must outlive what is returned.

    Positions are int64. The last column of `mask_BS`, of any integer type or bool, is 0 for padding.
    """
    last, size = None, 0
    if mask_BS is not None:
        size = mask_BS.element_size()
        last = mask_BS.data_ptr() + (mask_BS.shape[1] - 1) * mask_BS.stride(1) * size
    return Memory(
        past_BC.data_ptr(),
        rate_H.data_ptr(),
        now_BC.data_ptr(),
        None if position_B1 is None else position_B1.data_ptr(),
        last,
        past_BC.stride(0),
        now_BC.stride(0),
        0 if position_B1 is None else position_B1.stride(0),
        0 if mask_BS is None or len(mask_BS) == 1 else mask_BS.stride(0),
        size,
        past_BC.shape[1] - len(rate_H) - 1,
    )


def fits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the library can work on hidden states (B, 1, D) with a gate's weight (E, W)."""
    if not hidden.is_cpu or hidden.ndim != 3 or hidden.shape[1] != 1:
        return False
    if hidden.dtype not in _DTYPES or weight.dtype not in _DTYPES or not weight.is_cpu:
        return False
    if type(hidden) is not Tensor or type(weight) is not Parameter:
        return False
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return False
    return hidden.shape[0] * weight.numel() <= LARGEST


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
    try:
        return Library() if FILE.is_file() else None
    except AttributeError as error:
        raise InputError(
            f"expected a compiled gate of this version, but {FILE} is of another ({error}); "
            "install moiety again (pip install -e .)"
        ) from error
