"""Bytes of a composite's folder, from the headers of its weight files."""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from moiety.compose.recipe import Mixture, Recipe, Routed
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.write import ITEM_BYTES, stored_bytes

OF_ONE_EXPERT = re.compile(r"\.experts(\.|_|$)")
BF16 = 2
MASK_COLUMNS = 8


@dataclass(frozen=True)
class Sizes:
    """`total` on disk, `active` for one token, `dense` with every packed matrix written out.

    Integer values count as bf16 in `dense`, and widths as multiples of 8. Where experts are
    differences to dense weights, whole experts take those weights' place in `dense`.
    """

    total: int
    active: int
    dense: int


def sizes_of(folder: Path, recipe: Recipe) -> Sizes:
    """Sizes of a built composite."""
    checkpoint = Checkpoint(folder)
    shapes = checkpoint.shapes()
    bytes_of = {n: prod(shape) * ITEM_BYTES.get(kind, 1) for n, (shape, kind) in shapes.items()}
    packed = {name: shapes[f"{name}_mask"][0] for name in shapes if f"{name}_mask" in shapes}
    replaced = {re.sub(r"\.experts$", ".weight", name) for name in packed} - set(packed)
    total, dense = stored_bytes(checkpoint), 0
    for name, size in bytes_of.items():
        if name in packed:
            width = ITEM_BYTES.get(shapes[name][1], BF16)
            dense += prod(packed[name]) * MASK_COLUMNS * width
        elif name not in replaced and not re.search(r"_(mask|scale)$", name):
            dense += size
    experts = sum(size for name, size in bytes_of.items() if OF_ONE_EXPERT.search(name))
    idle = experts if isinstance(recipe.compose, Mixture | Routed) else 0
    active_share = getattr(recipe.compose, "top_k", 1) / len(recipe.experts)
    return Sizes(total, round(total - idle * (1 - active_share)), dense)
