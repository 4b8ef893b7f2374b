# type: ignore  # Triton's own language and its launches are no Python to a type checker.
"""Dense contenders on a GPU: torch's products, transformers' experts, and a twin of our kernel.

The twin is the same Triton product with dense weights, so that what sparsity gains can be told from
what a peer leaves lying. T tokens, O/I out/in features, F expert width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moiety.experts.kernels.cuda.semi_structured import Products


def separate(input: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Three cuBLAS products and the activation between them."""
    gate, up = gate_up.chunk(2)
    inner = functional.silu(functional.linear(input, gate)) * functional.linear(input, up)
    return functional.linear(inner, down)


def fused(input: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Gate and up as one cuBLAS product."""
    gate, up = functional.linear(input, gate_up).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, down)


def batched(input: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same through `bmm`."""
    gate, up = torch.bmm(input[None], gate_up.T[None]).chunk(2, dim=-1)
    return torch.bmm(functional.silu(gate) * up, down.T[None])[0]


def grouped(input: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same through `grouped_mm` with one group."""
    ends = torch.full((1,), len(input), dtype=torch.int32, device=input.device)
    gate, up = functional.grouped_mm(input, gate_up.T[None], offs=ends).chunk(2, dim=-1)
    return functional.grouped_mm(functional.silu(gate) * up, down.T[None], offs=ends)


def twin(input: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Our kernel's dense twin."""
    gate, up = _twin(input, gate_up, 1).chunk(2, dim=-1)
    return _twin(functional.silu(gate) * up, down, 4)


def _twin(input_TI: Tensor, weight_OI: Tensor, parts: int) -> Tensor:
    tokens, (rows, width) = len(input_TI), weight_OI.shape
    block = max(8, triton.next_power_of_2(tokens))
    sums = input_TI.new_empty(parts, tokens, rows, dtype=torch.float32)
    each = width // 128 // parts
    _product[(triton.cdiv(rows, 64), 1, parts)](
        input_TI, weight_OI, sums, tokens, rows, width, each, 64, block, 4, num_warps=4
    )
    return sums.sum(0).to(input_TI.dtype) if parts > 1 else sums[0].to(input_TI.dtype)


@triton.jit(do_not_specialize=["tokens"])
def _product(
    input,
    weight,
    sums,
    tokens,
    rows,
    width,
    EACH: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    WARPS: tl.constexpr,
):
    row_n = tl.program_id(0) * BN + tl.arange(0, BN)
    token_m = tl.arange(0, BM)
    there_m = token_m < tokens
    column = tl.program_id(2) * EACH * 128 + tl.arange(0, 128)
    total = tl.zeros((WARPS, BN // WARPS, BM), tl.float32)
    for turn in tl.range(0, EACH, num_stages=4):
        at = column + turn * 128
        tile = tl.load(weight + row_n[:, None] * width + at[None, :], eviction_policy="evict_first")
        tile = tile.reshape(WARPS, BN // WARPS, 128)
        token = tl.load(
            input + token_m[None, :] * width + at[:, None], mask=there_m[None, :], other=0.0
        )
        token = tl.broadcast_to(tl.expand_dims(token, 0), (WARPS, 128, BM))
        total = tl.dot(tile, token, total)
    at = (tl.program_id(2) * tokens + token_m[None, :]) * rows + row_n[:, None]
    there = (row_n < rows)[:, None] & there_m[None, :]
    tl.store(sums + at, total.reshape(BN, BM), mask=there)


def mixtral_experts(name: str, gate_up: Tensor, down: Tensor, active: int) -> MixtralExperts:
    """transformers' experts with given weights (E, 2F, D) and (E, D, F)."""
    count, width, expert_width = down.shape
    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=expert_width,
        num_local_experts=count,
        num_experts_per_tok=active,
    )
    config._experts_implementation = name
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    experts.down_proj = nn.Parameter(down, requires_grad=False)
    return experts


class SemiStructured:
    """torch's own 2:4 product (cuSPARSELt), its algorithm searched for."""

    def __init__(self, weight_OI: Tensor, products: Products) -> None:
        self.weight = torch._cslt_compress(weight_OI)
        self.products = products

    def __call__(self, input_TI: Tensor) -> Tensor:
        """`input @ weightᵀ`."""
        return self.products(input_TI, self.weight)
