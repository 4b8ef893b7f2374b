"""A pruning problem that looks like a layer's: correlated inputs, channels of unequal size."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Problem = Callable[..., tuple[Tensor, Tensor]]


def make_problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) and the Gram matrix of four inputs a column."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden = max(1, columns // 2)
    inputs = normal(4 * columns, hidden) @ normal(hidden, columns)
    inputs += normal(4 * columns, columns)
    inputs *= torch.rand(columns, generator=generator).exp()
    return normal(rows, columns), inputs.T @ inputs


@pytest.fixture(scope="session")
def problem() -> Problem:
    """`problem(rows, columns, seed=0)` gives a weight and a Gram matrix."""
    return make_problem
