"""What must hold of a merge: its pattern, and that packed it is the dense model it stands for.

B batch, S sequence.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moiety.compose.invariants.statement import Invariant, apart, logits_of, stock_model
from moiety.compose.merged import MergeBuilder
from moiety.compose.opening import open_any
from moiety.experts.delta import TaskVector, is_task_vector
from moiety.experts.unpack import dense_view


def of_merge(builder: MergeBuilder, folder: Path, ids_BS: Tensor) -> list[Invariant]:
    """Those of a sparse merge; a dense one has neither pattern nor packed matrices."""
    if builder.settings.sparse == "none":
        return []
    facts = builder.facts()
    pattern = f"all {facts['matrices']} pruned matrices have the pattern {facts['pattern']}"
    model = open_any(folder, torch.float32).model
    packed = model.float() if is_task_vector(folder) else model
    twin = stock_model(builder.base.config, dict(_dense(folder)))
    difference = apart(logits_of(packed, ids_BS), logits_of(twin, ids_BS))
    return [
        Invariant(pattern, 0.0, 0.0),
        Invariant("packed, it is the dense model that its weights stand for", difference),
    ]


def _dense(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The merge's whole weights in fp32, a task vector's added to its base."""
    if not is_task_vector(folder):
        weights = dense_view(folder)
        yield from ((name, weights[name].float()) for name in weights)
        return
    vector = TaskVector(folder)
    modules = set(vector.packing.modules)
    for name in vector.base:
        module = name.removesuffix(".weight")
        if module in modules:
            yield name, vector.base[name].float() + vector.packed(module).dense().float()
        else:
            yield name, (vector.raw[name] if name in vector.raw else vector.base[name]).float()
