"""Muon in float32 on the CPU: momentum whose matrices are made orthogonal (Jordan et al. 2024).

`torch.optim.Muon` iterates in bfloat16, which is some fifty times slower than float32 on CPUs
without bfloat16 arithmetic, so the demo brings the same update in the gradients' own dtype.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SMALLEST_NORM = 1e-7


def orthogonal(update_OI: Tensor, iterations: int = 5) -> Tensor:
    """Move the singular values of a matrix to about one by Newton-Schulz iterations.

    Shapes: (O, I) in and out. Jordan et al. 2024, the quintic iteration.
    """
    a, b, c = _COEFFICIENTS
    tall = update_OI.shape[0] > update_OI.shape[1]
    matrix = update_OI.T if tall else update_OI
    matrix = matrix / matrix.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(iterations):
        gram = matrix @ matrix.T
        matrix = torch.addmm(matrix, torch.addmm(gram, gram, gram, beta=b, alpha=c), matrix, beta=a)
    return matrix.T if tall else matrix


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonal updates, for two-dimensional hidden matrices only.

    The update has the root mean square of Adam's (0.2, Liu et al. 2025), so that learning rates
    of Adam carry over.
    """

    def __init__(self, matrices: Iterable[Tensor], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, matrix.grad, group["lr"], group["momentum"])

    def _update(self, matrix_OI: Tensor, gradient_OI: Tensor, rate: float, momentum: float) -> None:
        state = self.state[matrix_OI]
        average_OI = state.setdefault("average", torch.zeros_like(matrix_OI))
        average_OI.lerp_(gradient_OI, 1 - momentum)
        direction_OI = orthogonal(gradient_OI.lerp(average_OI, momentum))
        scale = 0.2 * max(matrix_OI.shape) ** 0.5
        matrix_OI.add_(direction_OI, alpha=-rate * scale)
