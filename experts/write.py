"""What a pruned model is on disk: its tensors and its configuration."""

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from moiety.experts.blocks import BlockResult
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.journal import Journal
from moiety.experts.matrix import MatrixReport
from moiety.experts.pattern import Pattern
from moiety.experts.quantizer import PackedConfig
from moiety.experts.unpack import DenseView

COMPANIONS = ("_mask", "_scale")
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


class PrunedWeights:
    """The tensors of a pruned model in order, from its source and the journal, one block held."""

    def __init__(self, view: DenseView, journal: Journal, results: Sequence[BlockResult]) -> None:
        self.view = view
        self.journal = journal
        self._block = {
            f"{matrix.name}.weight": index
            for index, result in enumerate(results)
            for matrix in result.matrices
            if not Pattern.parse(matrix.pattern).is_dense
        }
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the whole model."""
        for name in self.view.raw:
            if name in self._block:
                yield from self._pruned(name)
            elif _stem(name) not in self._block:
                yield name, self.view.raw[name]

    def task_vector(self, base: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The pruned differences, and whole what else is not equal to the base."""
        for name in self.view:
            if name in self._block:
                yield from self._pruned(name)
            elif name not in base or not _equal(base[name], self.view[name]):
                yield name, self.view[name]

    def _pruned(self, name: str) -> Iterator[tuple[str, Tensor]]:
        index = self._block[name]
        if self._held[0] != index:
            self._held = index, self.journal.read(index)[0]
        for spelling in (name, *(f"{name}{companion}" for companion in COMPANIONS)):
            if spelling in self._held[1]:
                yield spelling, self._held[1][spelling]


def _stem(name: str) -> str:
    """The weight a mask or scale belongs to."""
    ends = [end for end in COMPANIONS if name.endswith(end)]
    return name.removesuffix(ends[0]) if ends else name


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def packed_config(
    view: DenseView, matrices: Sequence[MatrixReport], pattern: str, values: str
) -> PretrainedConfig:
    """The source's configuration with the packed matrices named.

    Matrices that were packed before and are not pruned again keep their pattern; that they hold
    values of the same kind is checked before (`preflight.check_values`).
    """
    config, before = copy.deepcopy(view.config), view.packing
    patterns = {matrix.name: matrix.pattern for matrix in matrices if matrix.pattern != "dense"}
    if before is not None:
        old = {name: str(before.pattern_of(name)) for name in before.modules}
        patterns = old | patterns
    if patterns:
        config.quantization_config = PackedConfig(
            pattern=pattern if pattern in patterns.values() else next(iter(patterns.values())),
            modules=sorted(patterns),
            values=values,
            patterns={name: own for name, own in sorted(patterns.items()) if own != pattern},
        )
    return config


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors of a checkpoint, from the file headers."""
    return sum(
        torch.Size(shape).numel() * ITEM_BYTES.get(dtype, 1)
        for shape, dtype in checkpoint.shapes().values()
    )
