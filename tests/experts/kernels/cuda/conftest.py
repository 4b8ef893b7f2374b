"""Triton's kernels on the GPU where there is one, else interpreted on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.experts import kernels
from moiety.experts.kernels import Weights

pytest.importorskip("triton", reason="Triton's kernels need Triton")


@dataclass(frozen=True)
class Gpu:
    """The kernels and where their tensors lie."""

    kernels: Any
    device: torch.device

    def stack(
        self, packs: Any, count: int, rows: int, columns: int, kind: str
    ) -> tuple[Tensor, Weights]:
        """Random 2:4 matrices, dense in fp64 and as planes."""
        dense, values, mask, scale = packs.stacked(count, rows, columns, "2:4", kind)
        stored = kernels.packed(values, mask, columns, scale)
        moved = stored._replace(
            values=values.to(self.device),
            mask=mask.to(self.device),
            scale=None if scale is None else scale.to(self.device),
        )
        planes = self.kernels.tile(moved)
        assert planes is not None
        return dense.double().to(self.device), planes


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """Real kernels on the first GPU, or interpreted ones with few multiprocessors."""
    from moiety.experts.kernels.cuda.forward import GpuKernels

    if torch.cuda.is_available():
        found = kernels.gpu_kernels(torch.device("cuda"))
        assert found is not None
        return Gpu(found, torch.device("cuda"))
    return Gpu(GpuKernels(processors=2, interpreted=True), torch.device("cpu"))


@pytest.fixture(autouse=True)
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that a kernel which skips an element fails."""
    torch.manual_seed(0)

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: object, **kwargs: object) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-7)

        return empty

    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", filled(torch.empty))
