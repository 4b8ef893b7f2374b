"""Many tokens an expert: sparse tensor cores where planes carry their metadata, else dense matrices.

Beside a dense model this costs the expansion of each matrix, once a call; `forward.py` says from how
many tokens on it is faster than expanding in registers for every block of tokens.

T tokens, A active experts, N tokens of one expert, O/I out/in features, F expert width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from moiety.experts.kernels import reference
from moiety.experts.kernels.cuda.semi_structured import Products, compressed
from moiety.experts.kernels.weights import Weights

Expand = Callable[[Weights, torch.dtype], Tensor]


class ManyTokens:
    """The products of many tokens on one device."""

    def __init__(self, expand: Expand) -> None:
        self._expand = expand
        self._products = Products()

    def linear(self, input_NI: Tensor, weights: Weights, which: int) -> Tensor:
        """`input @ weightᵀ` (N, O) with one matrix of the stack."""
        matrix = compressed(weights, which)
        if matrix is not None:
            return self._products(input_NI, matrix)
        return functional.linear(input_NI, self._expand(weights.one(which), input_NI.dtype)[0])

    def forward(
        self,
        input_TI: Tensor,
        gate_up: Weights | None,
        down: Weights,
        activation: str,
        experts_TA: Tensor | None,
        weights_TA: Tensor | None,
        base_TO: Tensor | None,
    ) -> Tensor:
        """As `GpuKernels.forward`."""

        def compute(expert: int, input_NI: Tensor) -> Tensor:
            if gate_up is None:
                return self.linear(input_NI, down, expert)
            gate_NF, up_NF = self.linear(input_NI, gate_up, expert).chunk(2, dim=-1)
            inner_NF = reference.activate(gate_NF, activation) * up_NF
            return self.linear(inner_NF, down, expert)

        if experts_TA is None or weights_TA is None:
            return compute(0, input_TI)
        shape = (len(input_TI), down.rows)
        output_TO = torch.zeros(shape, dtype=torch.float32, device=input_TI.device)
        if base_TO is not None:
            output_TO += base_TO
        return reference.routed_sum(
            input_TI, compute, down.stack, output_TO, experts_TA, weights_TA
        )
