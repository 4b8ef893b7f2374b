"""Prune one matrix: choose the mask, move the kept values, store them; the error after each step.

O out features, I in features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.experts.methods import METHODS, output_energy, quantise, refit
from moiety.experts.packing import Packed, pack
from moiety.experts.pattern import Pattern
from moiety.experts.settings import INTEGER_BITS, PruneSettings

MASKED = "mask"


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """One pruned matrix.

    `errors` holds, after each step in order, the relative output error on the calibration
    tokens: `tr(ΔGΔᵀ) / tr(WGWᵀ)` for the Gram matrix G of the matrix's input.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    errors: dict[str, float]

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "MatrixReport":
        """From its JSON form."""
        rows, columns = row["shape"]
        return cls(**{**row, "shape": (rows, columns)})


@dataclass
class Matrix:
    """A matrix on its way: dense weight, calibration, mask and the weight as pruned so far."""

    name: str
    weight_OI: Tensor
    gram_II: Tensor
    pattern: Pattern
    mask_OI: Tensor = field(default_factory=lambda: torch.empty(0))
    pruned_OI: Tensor = field(default_factory=lambda: torch.empty(0))
    errors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._total = output_energy(self.weight_OI, self.gram_II)

    def prune(self, settings: PruneSettings, mask_OI: Tensor | None = None) -> None:
        """Choose the mask (or take the given one) and the kept values.

        Raises InputError that names the matrix.
        """
        try:
            if mask_OI is None:
                self._step(
                    settings.method,
                    METHODS[settings.method](self.weight_OI, self.gram_II, self.pattern),
                )
                self.mask_OI = whole_mask(self.pruned_OI, self.pattern)
            else:
                self.mask_OI = mask_OI
                self._step(MASKED, self.weight_OI * mask_OI)
            if settings.refit_steps and not self.pattern.is_dense:
                refitted_OI = refit(
                    self.weight_OI,
                    self.pruned_OI,
                    self.gram_II,
                    settings.refit_steps,
                    mask_OI=self.mask_OI,
                )
                self._step("refit", refitted_OI)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def recovered(self, weight_OI: Tensor) -> None:
        """Take the values that recovery trained."""
        self._step("recovery", weight_OI.clone())

    def store(self, values: str) -> tuple[Packed, MatrixReport]:
        """Pack the kept values, on the CPU; integers are rounded inside a sweep of their own."""
        scale_OG = None
        if values in INTEGER_BITS:
            quantised_OI, scale_OG = quantise(
                self.weight_OI,
                self.pruned_OI,
                self.gram_II,
                INTEGER_BITS[values],
                mask_OI=self.mask_OI,
            )
            self.pruned_OI = quantised_OI
        try:
            packed = pack(
                self.pruned_OI.cpu(),
                self.pattern,
                values,
                None if scale_OG is None else scale_OG.cpu(),
                mask_OI=self.mask_OI.cpu(),
            )
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error
        self._step("stored", packed.dense().to(self.weight_OI))
        rows, columns = self.weight_OI.shape
        report = MatrixReport(
            name=self.name,
            shape=(rows, columns),
            pattern=str(self.pattern),
            errors=self.errors,
        )
        return packed, report

    def _step(self, name: str, pruned_OI: Tensor) -> None:
        self.pruned_OI = pruned_OI
        error = output_energy(self.weight_OI - pruned_OI, self.gram_II)
        self.errors[name] = error / self._total if self._total > 0 else 0.0


def whole_mask(pruned_OI: Tensor, pattern: Pattern) -> Tensor:
    """The mask of a pruned matrix, filled up to the pattern's count where kept values are zero."""
    return pattern.mask((pruned_OI != 0).to(torch.uint8), within="matrix")
