"""Prune decoder blocks one after the other, each on what the pruned ones before it put out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.experts.calibrate import BlockBatch, GramCollector, advance, linears_of
from moiety.experts.kernels.reference import unpack_bits
from moiety.experts.matrix import Matrix, MatrixReport
from moiety.experts.methods import outlier_share, owl_densities
from moiety.experts.packing import Packed
from moiety.experts.pattern import Pattern
from moiety.experts.recovery.block import reconstruct
from moiety.experts.settings import PruneSettings
from moiety.experts.stream import StreamedModel
from moiety.progress import SILENT, Progress


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
    taken over.
    """

    stream: StreamedModel
    settings: PruneSettings
    patterns: Sequence[Pattern]
    base: Mapping[str, Tensor] | None = None
    masks: Mapping[str, Tensor] | None = None
    progress: Progress = SILENT

    def prune(self, index: int, batches: list[BlockBatch]) -> BlockResult:
        """Prune block `index`; the batches' hidden states go on to the next one."""
        self.stream.enter(index, batches)
        with self.stream.block(index) as block:
            linears = linears_of(block, self.settings.sites)
            outputs: list[Tensor] | None = None if self.settings.recovery is None else []
            grams = GramCollector(linears).run(block, batches, outputs)
            matrices = {
                name: self._pruned(index, name, linears[name], grams[name])
                for name in self.progress.track(linears, f"block {index}: matrices")
            }
            recovery = None
            if outputs is not None:
                recovery = self._recovered(block, batches, outputs, matrices)
            result = self._stored(index, linears, matrices, recovery)
            advance(block, batches)
        return result

    def repeat(self, index: int, batches: list[BlockBatch], result: BlockResult) -> None:
        """Run the batches through a block that was pruned before."""
        self.stream.enter(index, batches)
        with self.stream.block(index) as block:
            for row in result.matrices:
                linear = block.get_submodule(row.name.removeprefix(self.stream.name(index, "")))
                assert isinstance(linear, nn.Linear)
                self._install(row.name, linear, result.packed(row))
            advance(block, batches)

    def _pruned(self, index: int, name: str, linear: nn.Linear, gram_II: Tensor) -> Matrix:
        full_name = self.stream.name(index, name)
        weight_OI = linear.weight.detach().clone()
        if self.base is not None:
            weight_OI -= self._of_base(full_name, weight_OI)
        matrix = Matrix(full_name, weight_OI, gram_II, self.patterns[index])
        matrix.prune(self.settings, self._mask(full_name, weight_OI))
        linear.weight.copy_(matrix.pruned_OI)
        return matrix

    def _of_base(self, name: str, weight_OI: Tensor) -> Tensor:
        assert self.base is not None
        base_OI = self.base[f"{name}.weight"]
        _check_shape(f"the base's {name}.weight", base_OI, weight_OI.shape)
        return base_OI.float()

    def _mask(self, name: str, weight_OI: Tensor) -> Tensor | None:
        if self.masks is None:
            return None
        bits_OB = self.masks[f"{name}.weight_mask"]
        rows, columns = weight_OI.shape
        _check_shape(f"the given mask of {name}.weight", bits_OB, (rows, -(-columns // 8)))
        return unpack_bits(bits_OB, columns)

    def _recovered(
        self,
        block: nn.Module,
        batches: list[BlockBatch],
        outputs: list[Tensor],
        matrices: Mapping[str, Matrix],
    ) -> dict[str, Any]:
        assert self.settings.recovery is not None
        masks = {name: matrix.mask_OI for name, matrix in matrices.items()}
        report = reconstruct(block, batches, outputs, masks, self.settings.recovery)
        for name, matrix in matrices.items():
            matrix.recovered(block.get_submodule(name).get_parameter("weight").detach())
        return asdict(report)

    def _stored(
        self,
        index: int,
        linears: Mapping[str, nn.Linear],
        matrices: Mapping[str, Matrix],
        recovery: dict[str, Any] | None,
    ) -> BlockResult:
        tensors: dict[str, Tensor] = {}
        reports: list[MatrixReport] = []
        for name, matrix in matrices.items():
            packed, report = matrix.store(self.settings.values)
            tensors.update(packed.tensors(f"{matrix.name}.weight"))
            reports.append(report)
            self._install(matrix.name, linears[name], packed)
        return BlockResult(tensors, reports, recovery)

    @torch.no_grad()
    def _install(self, name: str, linear: nn.Linear, packed: Packed) -> None:
        weight_OI = packed.dense().float()
        if self.base is not None:
            weight_OI += self._of_base(name, weight_OI)
        linear.weight.copy_(weight_OI)


def _check_shape(what: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise InputError(
            f"expected {what} to have shape {tuple(expected)}, but it has {tuple(tensor.shape)}; "
            "it is from another architecture"
        )


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
    return owl_densities(shares, Pattern.parse(settings.pattern).density, sizes=sizes)
