"""Many tokens an expert: sparse tensor cores where planes carry their metadata, else dense matrices.

Beside a dense model this costs the expansion of each matrix, once a call; `forward.py` says from how
many tokens on it is faster than expanding in registers for every block of tokens. Routed bf16
matrices that are small enough together are expanded at once and multiplied by `grouped_mm`, without
the host knowing how many tokens each expert has; others go one expert after the other.

T tokens, A active experts, R routed rows, N tokens of one expert, O/I out/in features, F expert width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from moiety.experts.kernels import reference
from moiety.experts.kernels.cuda.combine import combine
from moiety.experts.kernels.cuda.routes import sort_routes
from moiety.experts.kernels.cuda.semi_structured import Products, compressed
from moiety.experts.kernels.weights import Weights

Expand = Callable[[Weights, torch.dtype], Tensor]
# Bytes of a dense stack up to which all of it is expanded at once.
MOST_BYTES = 2**31
_ALIGNED = 8


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
        stacks = [down] if gate_up is None else [gate_up, down]

        def compute(expert: int, input_NI: Tensor) -> Tensor:
            if gate_up is None:
                return self.linear(input_NI, down, expert)
            gate_NF, up_NF = self.linear(input_NI, gate_up, expert).chunk(2, dim=-1)
            inner_NF = reference.activate(gate_NF, activation) * up_NF
            return self.linear(inner_NF, down, expert)

        if experts_TA is None or weights_TA is None:
            return compute(0, input_TI)
        if not compressed_all(stacks) and groupable(stacks, input_TI.dtype):
            return self.grouped(
                input_TI, gate_up, down, activation, experts_TA, weights_TA, base_TO
            )
        shape = (len(input_TI), down.rows)
        output_TO = torch.zeros(shape, dtype=torch.float32, device=input_TI.device)
        if base_TO is not None:
            output_TO += base_TO
        return reference.routed_sum(
            input_TI, compute, down.stack, output_TO, experts_TA, weights_TA
        )

    def grouped(
        self,
        input_TI: Tensor,
        gate_up: Weights | None,
        down: Weights,
        activation: str,
        experts_TA: Tensor,
        weights_TA: Tensor,
        base_TO: Tensor | None,
    ) -> Tensor:
        """All experts at once, without a host sync; `groupable` says for which matrices."""
        token_R, row_R, end_E = sort_routes(experts_TA, down.stack)
        ends = end_E.int()
        inner_RF = input_TI[token_R]
        if gate_up is not None:
            gate_RF, up_RF = self._grouped(inner_RF, gate_up, ends).chunk(2, dim=-1)
            inner_RF = reference.activate(gate_RF, activation) * up_RF
        sums_SRO = self._grouped(inner_RF, down, ends)[None]
        return combine(sums_SRO, row_R, down.stack, weights_TA, base_TO, input_TI, sorted_rows=True)

    def _grouped(self, input_RI: Tensor, weights: Weights, ends: Tensor) -> Tensor:
        dense_EIO = self._expand(weights, input_RI.dtype).transpose(1, 2)
        return functional.grouped_mm(input_RI, dense_EIO, offs=ends)


def compressed_all(stacks: list[Weights]) -> bool:
    """Whether every matrix carries cuSPARSELt's metadata."""
    return all(compressed(weights, 0) is not None for weights in stacks)


def groupable(stacks: list[Weights], dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` takes these matrices dense, and they are small enough."""
    sizes = [(weights.rows, weights.columns, weights.stack) for weights in stacks]
    aligned = all(rows % _ALIGNED == columns % _ALIGNED == 0 for rows, columns, _ in sizes)
    small = all(2 * rows * columns * stack <= MOST_BYTES for rows, columns, stack in sizes)
    return dtype == torch.bfloat16 and aligned and small
