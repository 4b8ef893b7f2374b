"""The sparse ops against dense ones: one linear layer, and a whole routed block of experts.

Peers hold the same pruned weights dense. Weights are bf16 values against fp32 and bf16 dense
ones, activations fp32 (bf16 for the bf16 peer).
"""

from typing import Any

import torch
from torch.nn import functional
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.timing import interleaved, ratios
from moiety.experts import Packed, Pattern, kernels, pack

OURS = "moiety"
TOKENS = (1, 8, 64, 256)
LINEAR_SHAPES = ((1024, 1024), (4096, 1024), (1024, 4096))
EXPERTS, ACTIVE, WIDTH, EXPERT_WIDTH = 8, 2, 512, 1408


def _packed(rows: int, columns: int) -> Packed:
    pattern = Pattern(2, 4)
    weight = torch.randn(rows, columns) / columns**0.5
    return pack(weight * pattern.mask(weight.abs()), pattern)


def linear_rows() -> list[dict[str, Any]]:
    """One packed matrix against `F.linear` in fp32 and bf16."""
    rows = []
    for out, columns in LINEAR_SHAPES:
        packed = _packed(out, columns)
        dense = packed.dense()
        single = dense.float()
        for tokens in TOKENS:
            input = torch.randn(tokens, columns)
            half = input.bfloat16()
            seconds = interleaved(
                {
                    OURS: lambda i=input, p=packed: kernels.sparse_linear(
                        i, p.values, p.mask_OB, p.in_features
                    ),
                    "linear_fp32": lambda i=input, w=single: functional.linear(i, w),
                    "linear_bf16": lambda i=half, w=dense: functional.linear(i, w),
                }
            )
            rows.append(_row(f"linear {out}x{columns}", tokens, seconds))
    return rows


def block_rows() -> list[dict[str, Any]]:
    """A routed block against transformers' own MoE block, eager and grouped."""
    peers = {name: _dense_block(name) for name in ("eager", "grouped_mm")}
    gate_up = [_packed(2 * EXPERT_WIDTH, WIDTH) for _ in range(EXPERTS)]
    down = [_packed(WIDTH, EXPERT_WIDTH) for _ in range(EXPERTS)]
    for peer in peers.values():
        peer.gate_up_proj.data = torch.stack([p.dense().float() for p in gate_up])
        peer.down_proj.data = torch.stack([p.dense().float() for p in down])
    ours = (*_stacked(gate_up), *_stacked(down))
    return [_block_row(tokens, ours, peers) for tokens in TOKENS]


Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _stacked(group: list[Packed]) -> tuple[torch.Tensor, torch.Tensor]:
    values, masks = [p.values for p in group], [p.mask_OB for p in group]
    return torch.stack(values), torch.stack(masks)


def _dense_block(implementation: str) -> MixtralExperts:
    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=EXPERT_WIDTH, num_local_experts=EXPERTS
    )
    config._experts_implementation = implementation
    return MixtralExperts(config).requires_grad_(False)


def _block_row(tokens: int, ours: Four, peers: dict[str, Any]) -> dict[str, Any]:
    hidden = torch.randn(tokens, WIDTH)
    weights, experts = torch.rand(tokens, EXPERTS).softmax(-1).topk(ACTIVE)
    contenders = {OURS: lambda: kernels.sparse_experts(hidden, *ours, experts, weights)}
    for name, peer in peers.items():
        contenders[f"transformers_{name}"] = lambda p=peer: p(hidden, experts, weights)
    expected = peers["eager"](hidden, experts, weights)
    torch.testing.assert_close(contenders[OURS](), expected, rtol=1e-4, atol=1e-4)
    case = f"block E={EXPERTS} top-{ACTIVE} {WIDTH}/{EXPERT_WIDTH}"
    return _row(case, tokens, interleaved(contenders))


def _row(case: str, tokens: int, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "case": case,
        "tokens": tokens,
        "values": "bf16",
        "seconds": seconds[OURS],
        "ratio": ratios(seconds, OURS),
    }
