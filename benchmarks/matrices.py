"""Random sparse matrices of real sizes, packed at once: no pruning, no dense detour.

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


FOUR_OF_EIGHT = [sum(1 << bit for bit in kept) for kept in itertools.combinations(range(8), 4)]
PATTERNS = ("2:4", "4:8", "0.5")


def random_mask(
    stack: int, rows: int, columns: int, device: str = "cpu", pattern: str = "2:4"
) -> Tensor:
    """Masks (E, O, B) that keep random columns: 2 of every 4, 4 of every 8, or half of a matrix."""
    shape = (stack, rows, columns // 8)
    if pattern == "0.5":
        return torch.randint(256, shape, dtype=torch.uint8, device=device)
    if pattern == "4:8":
        masks = torch.tensor(FOUR_OF_EIGHT, dtype=torch.uint8, device=device)
        return masks[torch.randint(len(FOUR_OF_EIGHT), shape, device=device)]
    nibbles = torch.tensor(NIBBLES, dtype=torch.uint8, device=device)
    halves = nibbles[torch.randint(6, (2, *shape), device=device)]
    return halves[0] | halves[1] << 4


def random_weights(stack: int, rows: int, columns: int, kind: str, pattern: str = "2:4") -> Weights:
    """A stack of random sparse matrices of about unit gain, columns a multiple of 8.

    With the pattern 0.5, whose number of kept values is random, a stack of one.
    """
    mask, kept, scale = random_mask(stack, rows, columns, pattern=pattern), columns // 2, None
    shape = (stack, rows, kept)
    if pattern == "0.5":
        shape = (1, int(reference.unpack_bits(mask, columns).sum()))
    if kind in LARGEST_CODE:
        limit = LARGEST_CODE[kind]
        values = torch.randint(-limit, limit + 1, shape, dtype=torch.int8)
        if kind == "int4":
            values = reference.pack_codes(values)
        groups = -(-columns // 128)
        scale = torch.full((stack, rows, groups), 2 / limit / kept**0.5, dtype=torch.bfloat16)
    else:
        dtype = DTYPES[kind]
        values = torch.randn(shape).mul_(kept**-0.5).to(dtype)
    return kernels.with_starts(kernels.packed(values, mask, columns, scale))


def tiles(weights: Weights) -> Weights:
    """What a loaded module holds: tiles, or the stored tensors without the compiled kernels."""
    return kernels.tiled(weights) or weights


def nbytes(weights: Weights) -> int:
    """Bytes of a stack."""
    return sum(tensor.nbytes for tensor in weights[:3] if isinstance(tensor, Tensor))
