"""The sparse ops on a GPU: which kernels run, with which buffers.

T tokens, A active experts, R routed rows, O/I out/in features, F expert width, S partial sums.
"""

# Triton's own language and its launches are no Python to a type checker.
# pyright: reportCallIssue=false

import torch
from torch import Tensor

from moiety.experts.kernels.cuda import layout
from moiety.experts.kernels.cuda.choose import SPAN, Choice, choose, splits, tokens_of_block
from moiety.experts.kernels.cuda.combine import combine
from moiety.experts.kernels.cuda.many import ManyTokens, compressed_all, groupable
from moiety.experts.kernels.cuda.product import product
from moiety.experts.kernels.cuda.routes import Plan, plan_routes
from moiety.experts.kernels.cuda.semi_structured import compressed, with_metadata
from moiety.experts.kernels.cuda.unfold import unfold
from moiety.experts.kernels.weights import Weights

_BITS = {"bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
_FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_HALVES = (torch.bfloat16, torch.float16)
_MOST_OFFSET = 2**31
# Tokens an expert beyond which its matrices are multiplied whole, with cuSPARSELt and densely.
MOST_TOKENS_SPARSE, MOST_TOKENS_DENSE = 64, 256


class GpuKernels:
    """The kernels of one device; `interpreted` runs them on CPU tensors, slowly, for tests."""

    def __init__(self, processors: int, interpreted: bool = False) -> None:
        self.processors = processors
        self.ptx = not interpreted
        self._many = ManyTokens(self.expand)

    def takes(self, weights: Weights, dtype: torch.dtype) -> bool:
        """Whether these matrices are planes that activations of `dtype` can be multiplied with."""
        values = _FLOATS.get(weights.kind, dtype)
        words = weights.rows * weights.values.shape[-1]
        return weights.is_planes and dtype in _HALVES and values == dtype and words < _MOST_OFFSET

    def tile(self, weights: Weights, *, prefill: bool = False) -> Weights | None:
        """2:4 matrices in the rows layout as planes; None where they are none, or in fp32.

        With `prefill`, 16-bit values get cuSPARSELt's metadata too, a bit a weight more.
        """
        if not layout.fits(weights):
            return None
        planes = layout.planes(weights)
        if not prefill or planes.kind not in _FLOATS:
            return planes
        return with_metadata(planes, self.expand(planes, _FLOATS[planes.kind]))

    def expand(self, weights: Weights, dtype: torch.dtype) -> Tensor:
        """All matrices of planes, dense (E, O, I)."""
        half = _FLOATS.get(weights.kind, dtype if dtype in _HALVES else torch.float16)
        return unfold(weights, dtype, _BITS[weights.kind], half, self.ptx)

    def forward(
        self,
        input_TI: Tensor,
        down: Weights,
        *,
        gate_up: Weights | None = None,
        activation: str = "silu",
        experts_TA: Tensor | None = None,
        weights_TA: Tensor | None = None,
        base_TO: Tensor | None = None,
    ) -> Tensor | None:
        """As `library.Library.forward`, in the input's dtype; None where these kernels do not work."""
        stacks = [down] if gate_up is None else [gate_up, down]
        if not all(self.takes(weights, input_TI.dtype) for weights in stacks):
            return None
        input_TI = input_TI.contiguous()
        tokens = len(input_TI)
        active = 1 if experts_TA is None else experts_TA.shape[1]
        if tokens * active == 0:
            return _nothing(input_TI, down, base_TO)
        if experts_TA is not None and weights_TA is not None:
            experts_TA, weights_TA = experts_TA.contiguous(), weights_TA.contiguous()
        base_TO = None if base_TO is None else base_TO.contiguous()
        each = tokens if experts_TA is None else tokens * active / down.stack
        widest = max(weights.columns for weights in stacks)
        large = tokens * active * widest >= _MOST_OFFSET
        if large or (each > most_tokens(down) and self._may_be_many(stacks, input_TI, experts_TA)):
            return self._many.forward(
                input_TI, gate_up, down, activation, experts_TA, weights_TA, base_TO
            )
        block = tokens_of_block(each if experts_TA is None else 1.25 * each)
        plan = None
        if experts_TA is not None:
            plan = plan_routes(experts_TA, down.stack, block)
        inner_RF, gather = input_TI, True
        if gate_up is not None:
            choice = choose(_BITS[gate_up.kind], True, block)
            inner_RF = self.product(
                input_TI, gate_up, choice, plan, active=active, activation=activation
            )
            gather = False
        choice = choose(_BITS[down.kind], False, block)
        sums_SRO = self.product(inner_RF, down, choice, plan, active=active, gather=gather)
        if plan is None and sums_SRO.dtype == input_TI.dtype:
            return sums_SRO[0]
        row_R = None if plan is None else plan.row_R
        planned = plan is not None and plan.mode == "planned"
        return combine(
            sums_SRO, row_R, down.stack, weights_TA, base_TO, input_TI, sorted_rows=planned
        )

    def _may_be_many(self, stacks: list[Weights], input: Tensor, experts_TA: Tensor | None) -> bool:
        """A graph being captured cannot wait for the numbers of tokens that one by one needs."""
        if experts_TA is None or not (input.is_cuda and torch.cuda.is_current_stream_capturing()):
            return True
        return not compressed_all(stacks) and groupable(stacks, input.dtype)

    def product(
        self,
        input: Tensor,
        weights: Weights,
        choice: Choice,
        plan: Plan | None = None,
        *,
        active: int = 1,
        gather: bool = True,
        activation: str | None = None,
        parts: int | None = None,
    ) -> Tensor:
        """One launch: (R, N/2) gated in the input's dtype, else sums (S, R, N) of `parts` parts.

        Sums are fp32, but in the input's dtype where they are final: one matrix, one part. With
        `gather` the input has a row a token, without it a row a route.
        """
        gated, gather = activation is not None, gather and plan is not None
        rows = weights.rows // (1 + gated)
        total = len(input) * (active if gather else 1)
        blocks = _cdiv(total, choice.tokens) if plan is None else plan.blocks
        narrow = _cdiv(rows, choice.rows // (1 + gated))
        if gated or parts is None:
            programs = narrow * blocks
            parts = 1 if gated else splits(choice, programs, weights.columns, self.processors)
        final = gated or (plan is None and parts == 1)
        shape = (total, rows) if gated else (parts, total, rows)
        output = input.new_empty(shape, dtype=input.dtype if final else torch.float32)
        each = _cdiv(weights.columns, SPAN * choice.sharing * parts)
        tensors, sizes = _of_planes(weights)
        product[(narrow, blocks, parts)](
            input,
            *tensors,
            output,
            *(tensors[1:2] * 4 if plan is None else plan.blocks_of()),
            total,
            weights.stack,
            weights.rows,
            weights.columns,
            *sizes,
            KIND=_BITS[weights.kind],
            GATED=gated,
            ACTIVATION=activation or "",
            MODE="one" if plan is None else plan.mode,
            ACTIVE=active,
            GATHER=gather,
            EVEN=weights.columns == SPAN * choice.sharing * parts * each,
            BN=choice.rows,
            BM=choice.tokens,
            WARPS=choice.warps,
            KS=choice.sharing,
            SPLITS=0 if gated else parts,
            EACH=each,
            PTX=self.ptx,
            STAGES=choice.stages,
            num_warps=choice.warps,
            num_stages=choice.stages,
        )
        return output


def most_tokens(weights: Weights) -> int:
    """Tokens an expert up to which the blocks' kernels are faster."""
    return MOST_TOKENS_DENSE if compressed(weights, 0) is None else MOST_TOKENS_SPARSE


def _of_planes(weights: Weights) -> tuple[list[Tensor], list[int]]:
    """Values, codes and scales (codes where there are none), and the words of each in a row."""
    codes = weights.mask
    assert codes is not None
    scale = codes if weights.scale is None else weights.scale
    values = [weights.values.shape[-1], weights.values.stride(0)]
    return [weights.values, codes, scale], [*values, codes.shape[-1], scale.shape[-1]]


def _nothing(input_TI: Tensor, down: Weights, base_TO: Tensor | None) -> Tensor:
    if base_TO is not None:
        return base_TO.to(input_TI.dtype)
    return input_TI.new_zeros(len(input_TI), down.rows)


def _cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
