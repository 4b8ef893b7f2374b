"""What a method does with its parameters, found out on small random tensors.

Asking the method itself holds for methods that are registered with mergekit later, and for every
choice of parameters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moiety.compose.merge.roles import BASE
from moiety.compose.merge.streaming import merge_one
from moiety.compose.recipe import Merging
from moiety.errors import InputError

SHAPE = (16, 64)


def keeps_zeros(merging: Merging, names: Sequence[str]) -> bool:
    """Whether a place that is zero in the base and all finetunes is zero in the merge."""
    tensors, generator = _draw(names)
    kept = torch.rand(SHAPE, generator=generator) < 0.5
    result = merge_one({n: t * kept for n, t in tensors.items()}, merging, "probe")
    return not bool(result[~kept].any())


def coefficients(merging: Merging, names: Sequence[str]) -> dict[str, float]:
    """The numbers c with `merge = base + Σ c · (finetune - base)`, by finetune.

    Raises InputError when the merge is no such sum.
    """
    rows = torch.eye(len(names))
    parts = {BASE: torch.zeros(1, len(names))}
    parts |= {name: rows[number : number + 1] for number, name in enumerate(names)}
    found = dict(zip(names, merge_one(parts, merging, "probe")[0].tolist(), strict=True))
    tensors, _ = _draw(names)
    base = tensors[BASE]
    expected = base + sum(found[name] * (tensors[name] - base) for name in names)
    if not torch.allclose(merge_one(tensors, merging, "probe"), expected, rtol=1e-4, atol=1e-4):
        raise InputError(
            f"expected a method that adds multiples of the task vectors to the base, such as "
            f"task_arithmetic, but {merging.method} with these parameters does not"
        )
    return found


def depends_on_weight(merging: Merging, names: Sequence[str]) -> bool:
    """Whether the size of one common `weight` matters (not where weights are normalised)."""
    tensors, _ = _draw(names)
    small, large = (
        merge_one(tensors, _with_weight(merging, weight), "probe") for weight in (0.25, 0.5)
    )
    return not torch.allclose(small, large, rtol=1e-4, atol=1e-5)


def _with_weight(merging: Merging, weight: float) -> Merging:
    return Merging(method=merging.method, parameters={**merging.parameters, "weight": weight})


def _draw(names: Sequence[str]) -> tuple[dict[str, Tensor], torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(SHAPE, generator=generator) for n in (BASE, *names)}, generator
