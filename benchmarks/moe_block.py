"""`python -m benchmarks.moe_block [--quick] [--json FILE]`: a routed block against transformers'.

E=8 experts, top-2, SwiGLU. Peers are transformers' own Mixtral experts with the same weights
dense: eager, grouped_mm and, for few tokens, batched_mm, each in bf16 and in fp32.
`transformers_best` is the fastest of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks import tables
from benchmarks.matrices import random_weights, tiles
from benchmarks.timing import interleaved
from moiety.experts import kernels
from moiety.experts.kernels import Weights

SIZES = ((1024, 4096), (2048, 8192))
QUICK_SIZES = ((128, 256),)
TOKENS = (1, 8, 64, 256)
EXPERTS, ACTIVE = 8, 2
KINDS = ("bf16", "int8", "int4")
BATCHED_TOKENS = 8
SECONDS = 8.0
TARGETS = {
    "avx512_bf16": {
        "bf16": {1: 3.3, 8: 3.2, 64: 2.3, 256: 1.6},
        "int8": {1: 4.5, 8: 4.2, 64: 2.2, 256: 1.5},
    }
}


def _tiled(gate_up: Weights, down: Weights) -> tuple[Weights, Weights]:
    above = kernels.tiled(gate_up.regrouped(2 * EXPERTS))
    return (gate_up, down) if above is None else (above, tiles(down))


def _dense(weights: Weights, dtype: torch.dtype) -> Tensor:
    return torch.stack([kernels.dense(weights, one, dtype) for one in range(EXPERTS)])


def _peer(name: str, gate_up: nn.Parameter, down: nn.Parameter) -> MixtralExperts:
    """transformers' experts with given weights (E, 2F, D) and (E, D, F)."""
    width, expert_width = down.shape[1:]
    config = MixtralConfig(
        hidden_size=width, intermediate_size=expert_width, num_local_experts=EXPERTS
    )
    config._experts_implementation = name
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = gate_up, down
    return experts


def _peers(gate_up: Weights, down: Weights) -> dict[str, tuple[MixtralExperts, torch.dtype]]:
    """transformers' implementations in both dtypes, each with weights of its own.

    If two shared them, the second would find in the caches what the first one read.
    """
    found: dict[str, tuple[MixtralExperts, torch.dtype]] = {}
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        dense = [_dense(one, dtype) for one in (gate_up, down)]
        for name in ("eager", "grouped_mm", "batched_mm"):
            own = [nn.Parameter(one.clone(), requires_grad=False) for one in dense]
            found[f"{name}_{label}"] = (_peer(name, *own), dtype)
    return found


def block_rows(
    sizes: Sequence[tuple[int, int]], tokens: Sequence[int], budget: float = SECONDS
) -> list[dict[str, Any]]:
    """Every size, number of tokens and kind of values."""
    return [row for size in sizes for row in _rows_of(*size, tokens, budget)]


def _rows_of(
    width: int, expert_width: int, tokens: Sequence[int], budget: float
) -> Iterator[dict[str, Any]]:
    stored = {
        kind: (
            random_weights(EXPERTS, 2 * expert_width, width, kind),
            random_weights(EXPERTS, width, expert_width, kind),
        )
        for kind in KINDS
    }
    peers = _peers(*stored["bf16"])
    ours = {kind: _tiled(*stacks) for kind, stacks in stored.items()}
    case = f"E={EXPERTS} top-{ACTIVE} {width}/{expert_width}"
    for count in tokens:
        others = tables.Others()
        hidden = torch.randn(count, width)
        weights, experts = torch.rand(count, EXPERTS).softmax(-1).topk(ACTIVE)
        contenders = _contenders(ours, peers, hidden, experts, weights)
        _check(contenders)
        seconds = interleaved(contenders, rounds=15, warm_up=2, budget=budget)
        for kind in KINDS:
            row = _row(case, count, kind, seconds, list(peers))
            yield row | {"others": others.share()}


def _contenders(
    ours: dict[str, tuple[Weights, Weights]],
    peers: dict[str, tuple[MixtralExperts, torch.dtype]],
    hidden: Tensor,
    experts: Tensor,
    weights: Tensor,
) -> dict[str, Callable[[], Tensor]]:
    dtype = torch.bfloat16 if tables.machine() == "avx512_bf16" else torch.float32
    own = hidden.to(dtype)
    found: dict[str, Callable[[], Tensor]] = {
        kind: lambda s=stacks: kernels.sparse_experts(own, *s, experts, weights)
        for kind, stacks in ours.items()
    }
    for name, (peer, dtype) in peers.items():
        if not name.startswith("batched") or len(hidden) <= BATCHED_TOKENS:
            input = hidden.to(dtype)
            routing = weights.to(dtype)
            found[name] = lambda p=peer, i=input, w=routing: p(i, experts, w)
    return found


def _check(contenders: dict[str, Callable[[], Tensor]]) -> None:
    """The same result before anything is timed."""
    expected, ours = contenders["eager_fp32"](), contenders["bf16"]().float()
    error = float((ours - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise ValueError(f"expected the block's result, but it is {error:g} off (relative)")


def _row(
    case: str, tokens: int, kind: str, seconds: dict[str, float], peers: list[str]
) -> dict[str, Any]:
    theirs = {name: seconds[name] for name in peers if name in seconds}
    best = {
        name: min(theirs[peer] for peer in theirs if peer.startswith(name))
        for name in ("eager", "grouped_mm", "batched_mm")
        if f"{name}_bf16" in theirs
    }
    shown = {"transformers_best": min(theirs.values()), **best, kind: seconds[kind]}
    targets = {"transformers_best": TARGETS.get(tables.machine(), {}).get(kind, {})}
    return tables.row(case, tokens, kind, shown, targets) | {"peer_seconds": theirs}


def main() -> None:
    """Run all, print the tables, write the JSON if asked."""
    parser = tables.parser("moe_block", __doc__)
    tables.in_pieces(parser)
    parser.add_argument("--sizes", nargs="+", type=tables.numbers, help="as 1024x4096")
    parser.add_argument("--tokens", type=tables.numbers, default=TOKENS, help="as 1,8,64")
    parser.add_argument("--budget", type=float, default=SECONDS, help="seconds a number of tokens")
    arguments = tables.applied(parser.parse_args())
    torch.manual_seed(0)
    sizes = arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES)
    with torch.inference_mode():
        rows = block_rows(sizes, arguments.tokens, arguments.budget)
    tables.show(rows, "routed block, 2:4")
    tables.write(rows, arguments.json, add=arguments.add)


if __name__ == "__main__":
    main()
