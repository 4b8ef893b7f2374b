"""Between the layouts of sparse matrices, and to dense ones.

O/I out/in features.
"""

import torch
from torch import Tensor

from moiety.experts.kernels import reference
from moiety.experts.kernels.gpu import gpu_kernels
from moiety.experts.kernels.library import Library, library
from moiety.experts.kernels.weights import Weights, contiguous


def tiled(weights: Weights, *, prefill: bool = False) -> Weights | None:
    """The same matrices in the kernels' own layout, tiles or planes, or None where they cannot be.

    Only 2:4 matrices can: on the CPU with the compiled kernels, on a GPU with Triton's. ValueError
    where a mask is not 2:4 though its counts say so. `prefill` adds what cuSPARSELt needs to be fast
    with many tokens on a GPU, for a bit a weight more.
    """
    values, mask = weights.values, weights.mask
    if values.is_cuda:
        kernels = gpu_kernels(values.device)
        return None if kernels is None else kernels.tile(weights, prefill=prefill)
    kernels = native(values)
    if kernels is None or mask is None or values.dim() != 3:
        return None
    kept = weights.columns // 2
    stored = -(-kept // 2) if weights.kind == "int4" else kept
    if weights.columns % 4 or values.shape[-1] != stored:
        return None
    return kernels.tile(contiguous(weights))


def with_starts(weights: Weights) -> Weights:
    """The same, knowing where each row begins if the compiled kernels would have to count."""
    kernels = native(weights.values)
    if kernels is None or weights.mask is None or weights.values.dim() != 2:
        return weights
    return weights._replace(starts=kernels.starts(contiguous(weights)))


def untiled(weights: Weights) -> Weights:
    """The rows layout again, bit for bit as it was."""
    if weights.is_planes:
        from moiety.experts.kernels.cuda import layout

        return layout.stored(weights)
    kernels = library()
    if not weights.is_tiled or kernels is None:
        return weights
    return kernels.untile(weights)


def dense(weights: Weights, which: int, dtype: torch.dtype) -> Tensor:
    """One dense matrix (O, I)."""
    if weights.is_planes:
        one = weights.one(which)
        kernels = gpu_kernels(weights.values.device)
        if kernels is not None:
            return kernels.expand(one, dtype)[0]
        return dense(untiled(one), 0, dtype)
    kernels = native(weights.values)
    if kernels is not None:
        wide = dtype if dtype == torch.bfloat16 else torch.float32
        return kernels.expand(contiguous(weights), which, wide).to(dtype)
    values, mask, scale = weights.values, weights.mask, weights.scale
    assert mask is not None
    one_scale = None if scale is None else scale[which]
    return reference.expand(values[which], mask[which], weights.columns, one_scale).to(dtype)


def native(tensor: Tensor) -> Library | None:
    """The compiled CPU kernels, for a tensor they can work on."""
    return library() if tensor.is_cpu else None
