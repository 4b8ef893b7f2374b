"""Prune decoder blocks one after the other, each on what the pruned ones before it put out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moiety.experts.calibrate import (
    BlockBatch,
    GramCollector,
    advance,
    advance_dense,
    linears_of,
)
from moiety.experts.kernels.reference import unpack_bits
from moiety.experts.matrix import Matrix, MatrixReport
from moiety.experts.memory import release_freed_memory
from moiety.experts.methods import outlier_share, owl_densities
from moiety.experts.packing import Packed
from moiety.experts.pattern import Pattern
from moiety.experts.recovery.block import BLOCK, MODEL, reconstruct
from moiety.experts.settings import PruneSettings
from moiety.experts.stream import StreamedModel
from moiety.progress import SILENT, Progress
from moiety.text import Windows


@dataclass(frozen=True)
class BlockResult:
    """A pruned block: its packed matrices' tensors, reports, and recovery's figures."""

    tensors: dict[str, Tensor]
    matrices: list[MatrixReport]
    recovery: dict[str, Any] | None

    def figures(self) -> dict[str, Any]:
        """JSON-like form, without the tensors."""
        return {"matrices": [asdict(m) for m in self.matrices], "recovery": self.recovery}

    @classmethod
    def read(cls, tensors: dict[str, Tensor], figures: Any) -> "BlockResult":
        """From what `figures` gave."""
        matrices = [MatrixReport.read(row) for row in figures["matrices"]]
        return cls(tensors, matrices, figures["recovery"])

    def packed(self, row: MatrixReport) -> Packed:
        """One matrix in packed form."""
        name = f"{row.name}.weight"
        values, mask_OB = self.tensors[name], self.tensors[f"{name}_mask"]
        return Packed(values, mask_OB, self.tensors.get(f"{name}_scale"), *row.shape)


@dataclass(frozen=True)
class BlockPruner:
    """How each block of one model is pruned.

    `patterns` has one pattern a block. `base`, if given, holds dense weights by name and what is
    pruned is the difference to them. `masks`, if given, is a packed checkpoint whose masks are
    taken over. That both fit is checked before (`preflight.check_matrices`).
    """

    stream: StreamedModel
    settings: PruneSettings
    patterns: Sequence[Pattern]
    base: Mapping[str, Tensor] | None = None
    masks: Mapping[str, Tensor] | None = None
    progress: Progress = SILENT

    @property
    def _target(self) -> str | None:
        return None if self.settings.recovery is None else self.settings.recovery.target

    def capture(self, windows: Windows) -> list[BlockBatch]:
        """The first block's batches, with the unpruned model's hidden states if they are wanted."""
        batches = self.stream.capture(windows, self.settings.batch_size)
        if self._target == MODEL:
            for batch in batches:
                batch.dense_WCD = batch.hidden_WCD
        return batches

    def prune(self, index: int, batches: list[BlockBatch]) -> BlockResult:
        """Prune block `index`; the batches' hidden states go on to the next one."""
        self.stream.enter(index, batches)
        with self.stream.block(index) as block:
            linears = linears_of(block, self.settings.sites)
            outputs: list[Tensor] | None = [] if self._target == BLOCK else None
            grams = GramCollector(linears).run(block, batches, outputs)
            targets = advance_dense(block, batches) if outputs is None else outputs
            release_freed_memory()
            if self.settings.recovery is None:
                result = self._one_by_one(index, linears, grams)
            else:
                result = self._together(index, block, grams, batches, targets)
            advance(block, batches)
        release_freed_memory()
        return result

    def repeat(self, index: int, batches: list[BlockBatch], result: BlockResult) -> None:
        """Run the batches through a block that was pruned before."""
        self.stream.enter(index, batches)
        with self.stream.block(index) as block:
            advance_dense(block, batches)
            for row in result.matrices:
                linear = block.get_submodule(row.name.removeprefix(self.stream.name(index, "")))
                assert isinstance(linear, nn.Linear)
                self._install(row.name, linear, result.packed(row))
            advance(block, batches)
        release_freed_memory()

    def _one_by_one(
        self, index: int, linears: Mapping[str, nn.Linear], grams: dict[str, Tensor]
    ) -> BlockResult:
        """Prune and store one matrix after the other; nothing but its packed form stays."""
        result = BlockResult({}, [], None)
        for name in self.progress.track(linears, f"block {index}: matrices"):
            matrix = self._pruned(index, name, linears[name], grams.pop(name))
            self._store(matrix, linears[name], result)
            del matrix
            release_freed_memory()
        return result

    def _together(
        self,
        index: int,
        block: nn.Module,
        grams: dict[str, Tensor],
        batches: list[BlockBatch],
        targets: list[Tensor],
    ) -> BlockResult:
        """Prune all matrices, train them together, then store them."""
        linears = linears_of(block, self.settings.sites)
        matrices: dict[str, Matrix] = {}
        for name in self.progress.track(linears, f"block {index}: matrices"):
            matrices[name] = self._pruned(index, name, linears[name], grams[name])
            linears[name].weight.copy_(matrices[name].pruned_OI)
        recovery = self._recovered(block, batches, targets, matrices)
        result = BlockResult({}, [], recovery)
        for name, matrix in matrices.items():
            self._store(matrix, linears[name], result)
        return result

    def _pruned(self, index: int, name: str, linear: nn.Linear, gram_II: Tensor) -> Matrix:
        full_name = self.stream.name(index, name)
        weight_OI = linear.weight.detach().clone()
        if self.base is not None:
            weight_OI -= self._of_base(full_name)
        matrix = Matrix(full_name, weight_OI, gram_II, self.patterns[index])
        matrix.prune(self.settings, self._mask(full_name, linear.in_features))
        return matrix

    def _of_base(self, name: str) -> Tensor:
        assert self.base is not None
        return self.base[f"{name}.weight"].to(self.stream.device, torch.float32)

    def _mask(self, name: str, columns: int) -> Tensor | None:
        if self.masks is None:
            return None
        return unpack_bits(self.masks[f"{name}.weight_mask"].to(self.stream.device), columns)

    def _recovered(
        self,
        block: nn.Module,
        batches: list[BlockBatch],
        targets: list[Tensor],
        matrices: Mapping[str, Matrix],
    ) -> dict[str, Any]:
        assert self.settings.recovery is not None
        masks = {name: matrix.mask_OI for name, matrix in matrices.items()}
        report = reconstruct(block, batches, targets, masks, self.settings.recovery)
        for name, matrix in matrices.items():
            matrix.recovered(block.get_submodule(name).get_parameter("weight").detach())
        return asdict(report)

    def _store(self, matrix: Matrix, linear: nn.Linear, result: BlockResult) -> None:
        packed, report = matrix.store(self.settings.values)
        result.tensors.update(packed.tensors(f"{matrix.name}.weight"))
        result.matrices.append(report)
        self._install(matrix.name, linear, packed)

    @torch.no_grad()
    def _install(self, name: str, linear: nn.Linear, packed: Packed) -> None:
        weight_OI = packed.dense().to(self.stream.device, torch.float32)
        if self.base is not None:
            weight_OI += self._of_base(name)
        linear.weight.copy_(weight_OI)


def allocate(
    stream: StreamedModel, batches: list[BlockBatch], settings: PruneSettings, progress: Progress
) -> list[float]:
    """A density for each block by OWL, from one pass of the dense model over the batches.

    Yin et al. 2023 (arXiv:2310.05175): blocks with more outliers among their Wanda scores keep
    more weights. The batches are used up.
    """
    shares, sizes = [], []
    for index in progress.track(range(len(stream)), "measure outliers", len(stream)):
        stream.enter(index, batches)
        with stream.block(index) as block:
            linears = linears_of(block, settings.sites)
            outputs: list[Tensor] = []
            grams = GramCollector(linears).run(block, batches, outputs)
            pairs = [(linear.weight, grams[name]) for name, linear in linears.items()]
            shares.append(outlier_share(pairs))
            sizes.append(sum(linear.weight.numel() for linear in linears.values()))
            for batch, output in zip(batches, outputs, strict=True):
                batch.hidden_WCD = output
        release_freed_memory()
    return owl_densities(shares, Pattern.parse(settings.pattern).density, sizes=sizes)
