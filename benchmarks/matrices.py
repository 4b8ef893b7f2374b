"""Random 2:4 matrices of real sizes, packed at once: no pruning, no dense detour.

E matrices of a stack, O/I out/in features, K kept values a row, B mask bytes a row.
"""

import itertools

import torch
from torch import Tensor

from moiety.experts import kernels
from moiety.experts.kernels import Weights, reference
from moiety.experts.kernels.weights import DTYPES
from moiety.experts.packing import LARGEST_CODE

NIBBLES = [1 << a | 1 << b for a, b in itertools.combinations(range(4), 2)]


def random_mask(stack: int, rows: int, columns: int, device: str = "cpu") -> Tensor:
    """Masks (E, O, B) that keep two random columns of every four."""
    nibbles = torch.tensor(NIBBLES, dtype=torch.uint8, device=device)
    halves = nibbles[torch.randint(6, (2, stack, rows, columns // 8), device=device)]
    return halves[0] | halves[1] << 4


def random_weights(stack: int, rows: int, columns: int, kind: str) -> Weights:
    """A stack of random 2:4 matrices of about unit gain, columns a multiple of 8."""
    mask, kept, scale = random_mask(stack, rows, columns), columns // 2, None
    if kind in LARGEST_CODE:
        limit = LARGEST_CODE[kind]
        values = torch.randint(-limit, limit + 1, (stack, rows, kept), dtype=torch.int8)
        if kind == "int4":
            values = reference.pack_codes(values)
        groups = -(-columns // 128)
        scale = torch.full((stack, rows, groups), 2 / limit / kept**0.5, dtype=torch.bfloat16)
    else:
        dtype = DTYPES[kind]
        values = torch.randn(stack, rows, kept).mul_(kept**-0.5).to(dtype)
    return kernels.packed(values, mask, columns, scale)


def tiles(weights: Weights) -> Weights:
    """What a loaded module holds: tiles, or the stored tensors without the compiled kernels."""
    return kernels.tiled(weights) or weights


def nbytes(weights: Weights) -> int:
    """Bytes of a stack."""
    return sum(tensor.nbytes for tensor in weights[:3] if isinstance(tensor, Tensor))
