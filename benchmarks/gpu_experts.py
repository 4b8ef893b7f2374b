"""`python -m benchmarks.gpu_experts [--quick] [--json FILE]`: 2:4 experts on a GPU against dense ones.

One expert (gate, up, down of 4096 x 14336) for few and for many tokens, values in bf16, int8 and
int4, and a routed block of eight experts; peers are dense bf16: cuBLAS with gate and up apart or
together, `bmm`, `grouped_mm`, a dense twin of our kernel, transformers' experts; beside them torch's
own 2:4 product and dense weights quantised by torch and torchao. CUDA graphs, weights rotated beyond the L2 cache, medians of interleaved rounds.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import gpu_peers, gpu_quantised, gpu_timing, tables
from benchmarks.matrices import random_mask
from moiety.experts import kernels
from moiety.experts.kernels import Weights
from moiety.experts.kernels.cuda.many import ManyTokens
from moiety.experts.kernels.cuda.semi_structured import Products
from moiety.files import write_json

WIDTH, EXPERT_WIDTH, EXPERTS = 4096, 14336, 8
FEW, MANY = (1, 8, 16, 32, 64, 128, 256), (1024, 4096)
ROUTED = ((1, 1), (1, 2), (8, 1), (64, 1), (64, 2), (512, 2), (2048, 2), (8192, 2))
TARGETS: dict[str, dict[Any, float]] = {
    "bf16": {1: 1.35, 8: 1.35, 16: 1.30, 64: 1.15},
    "int8": {1: 2.0, 8: 2.0, 16: 2.0},
    "int4": {1: 2.5, 8: 2.5, 16: 2.5},
    "routed": {(64, 1): 1.35},
    "bf16_prefill": {4096: 1.10},
}
OURS = ("bf16", "int8", "int4", "bf16_prefill", "bf16_expanded", "semi_structured")
PEERS: dict[str, Callable[..., Tensor]] = {
    "cublas_separate": gpu_peers.separate,
    "cublas_fused": gpu_peers.fused,
    "bmm": gpu_peers.batched,
    "grouped_mm": gpu_peers.grouped,
}
_MOST_OF_TWIN = 64
QUANTISED = (1, 16)
LEAST_MANY = 64


def random_planes(
    stack: int, rows: int, columns: int, kind: str, *, prefill: bool = False
) -> Weights:
    """Random 2:4 matrices of about unit gain on the device."""
    mask = random_mask(stack, rows, columns, "cuda")
    kept, scale = columns // 2, None
    if kind == "bf16":
        values = (torch.randn(stack, rows, kept, device="cuda") * kept**-0.5).bfloat16()
    else:
        limit = 127 if kind == "int8" else 7
        shape = (stack, rows, kept if kind == "int8" else kept // 2)
        values = torch.randint(-limit, limit + 1, shape, dtype=torch.int8, device="cuda")
        if kind == "int4":
            high = torch.randint(1, 16, shape, device="cuda")
            values = ((values + 8) | high << 4).to(torch.uint8)
        size = (stack, rows, columns // 128)
        scale = torch.full(size, 2 / limit / kept**0.5, dtype=torch.bfloat16, device="cuda")
    planes = kernels.tiled(kernels.packed(values, mask, columns, scale), prefill=prefill)
    if planes is None:
        raise SystemExit("expected an NVIDIA GPU of compute capability 8.0 or newer, and Triton")
    return planes


def nbytes(*stacks: Weights) -> int:
    """Bytes of stacks on the device."""
    return sum(t.nbytes for weights in stacks for t in weights if isinstance(t, Tensor))


def dense_of(weights: Weights) -> Tensor:
    """A stack of bf16 planes, dense."""
    each = [kernels.dense(weights, one, torch.bfloat16) for one in range(weights.stack)]
    return torch.stack(each)


def expert_rows(few: Sequence[int], many: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One expert: every number of tokens and kind of values."""
    shapes = ((2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH))
    turns = gpu_timing.copies(nbytes(*(random_planes(1, *shape, "int4") for shape in shapes)))
    ours: dict[str, list[Any]] = {
        kind: [tuple(random_planes(1, *shape, kind) for shape in shapes) for _ in range(turns)]
        for kind in ("bf16", "int8", "int4")
    }
    dense = [tuple(dense_of(weights)[0] for weights in pair) for pair in ours["bf16"]]
    products = Products()
    semi = [tuple(_parts(matrix, products) for matrix in pair) for pair in dense[:2]]
    stored = [tuple(kernels.untiled(weights) for weights in pair) for pair in ours["bf16"][:2]]
    ours["bf16_prefill"] = [
        tuple(kernels.tiled(weights, prefill=True) for weights in pair) for pair in stored
    ]
    quantised, refused = gpu_quantised.experts(dense)
    print("left out:", refused or "none")
    for tokens in (*few, *many):
        input = torch.randn(tokens, WIDTH, device="cuda").bfloat16()
        contenders = _contenders(input, ours, dense, semi)
        _check(contenders)
        if tokens in QUANTISED:
            contenders |= {
                name: lambda turn, made=made, input=input: made[turn % len(made)](input)
                for name, made in quantised.items()
            }
        seconds = gpu_timing.interleaved(contenders, turns=2 * turns if tokens < 1024 else turns)
        sizes = {kind: nbytes(*pairs[0]) for kind, pairs in ours.items()}
        sizes |= {name: 3 * WIDTH * EXPERT_WIDTH * 2 for name in (*PEERS, "twin")}
        yield from _rows("one expert", tokens, seconds, sizes)


def _contenders(
    input: Tensor, ours: dict[str, list[Any]], dense: list[Any], semi: list[Any]
) -> dict[str, Callable[[int], object]]:
    """Each takes the next copy of its weights at every turn."""
    gpu = kernels.gpu_kernels(torch.device("cuda"))
    assert gpu is not None
    found: dict[str, Callable[[int], object]] = {
        name: lambda turn, run=run: run(input, *dense[turn % len(dense)])
        for name, run in PEERS.items()
    }
    if len(input) <= _MOST_OF_TWIN:
        found["twin"] = lambda turn: gpu_peers.twin(input, *dense[turn % len(dense)])
    if len(input) >= 16:
        found["semi_structured"] = lambda turn: _semi(input, semi[turn % len(semi)])
    for kind, pairs in ours.items():
        if kind != "bf16_prefill" or len(input) > LEAST_MANY:
            found[kind] = lambda turn, pairs=pairs: gpu.forward(
                input, pairs[turn % len(pairs)][1], gate_up=pairs[turn % len(pairs)][0]
            )
    if len(input) > LEAST_MANY:
        many, pairs = ManyTokens(gpu.expand), ours["bf16"]
        found["bf16_expanded"] = lambda turn: many.forward(
            input,
            pairs[turn % len(pairs)][0],
            pairs[turn % len(pairs)][1],
            "silu",
            None,
            None,
            None,
        )
    return found


def _parts(matrix: Tensor, products: Products) -> list[gpu_peers.SemiStructured]:
    halves = matrix.chunk(2) if len(matrix) == 2 * EXPERT_WIDTH else [matrix]
    return [gpu_peers.SemiStructured(half.contiguous(), products) for half in halves]


def _semi(input: Tensor, pair: Any) -> Tensor:
    (gate, up), (down,) = pair
    return down(torch.nn.functional.silu(gate(input)) * up(input))


def _check(contenders: dict[str, Callable[[int], Any]]) -> None:
    """The same results before anything is timed, NaN-filled memory or not."""
    expected = contenders["cublas_separate"](0).float()
    for name in set(contenders) - {"int8", "int4"}:
        error = float((contenders[name](0).float() - expected).norm() / expected.norm())
        if not error < 2e-2:
            raise ValueError(f"expected the dense result of {name}, but it is {error:g} off")


def _rows(
    case: str, tokens: int, seconds: dict[str, float], sizes: dict[str, int], active: int = 1
) -> Iterator[dict[str, Any]]:
    peers = [name for name in seconds if name not in OURS]
    best = min(seconds[name] for name in peers if name not in gpu_quantised.MAKERS)
    for kind in OURS:
        if kind in seconds:
            ratio = {"dense_best": best / seconds[kind]}
            ratio |= {name: seconds[name] / seconds[kind] for name in peers}
            key = tokens if case == "one expert" else (tokens, active)
            least = TARGETS.get("routed" if case != "one expert" else kind, {})
            yield {
                "case": case,
                "tokens": tokens,
                "values": kind,
                "seconds": seconds[kind],
                "ratio": ratio,
                "gigabytes_per_second": sizes.get(kind, 0) / seconds[kind] / 1e9,
                "target": {"dense_best": least[key]} if key in least else {},
            }


def block_rows(routed: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Eight experts, tokens spread over all of them."""
    shapes = ((2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH))
    gate_up, down = (random_planes(EXPERTS, *shape, "bf16") for shape in shapes)
    dense_gate_up, dense_down = dense_of(gate_up), dense_of(down)
    for tokens, active in routed:
        input = torch.randn(tokens, WIDTH, device="cuda").bfloat16()
        weights, experts = torch.rand(tokens, EXPERTS, device="cuda").topk(active)
        contenders: dict[str, Callable[[int], object]] = {
            "bf16": lambda _, e=experts, w=weights, i=input: kernels.sparse_experts(
                i, gate_up, down, e, w
            )
        }
        for name in ("grouped_mm", "batched_mm"):
            if name == "grouped_mm" or tokens * active <= 8:
                peer = gpu_peers.mixtral_experts(name, dense_gate_up, dense_down, active)
                contenders[f"transformers_{name}"] = (
                    lambda _, p=peer, e=experts, w=weights, i=input: p(i, e, w.bfloat16())
                )
        expected = contenders["transformers_grouped_mm"](0)
        assert isinstance(expected, Tensor)
        found = contenders["bf16"](0)
        assert isinstance(found, Tensor)
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        if not error < 2e-2:
            raise ValueError(f"expected the dense result, but it is {error:g} off")
        seconds = gpu_timing.interleaved(contenders, turns=4)
        hit = len(experts.unique())
        size = nbytes(gate_up, down) * hit // EXPERTS
        yield from _rows(f"E={EXPERTS} top-{active}", tokens, seconds, {"bf16": size}, active)


def show(rows: Sequence[dict[str, Any]], head: dict[str, Any]) -> None:
    """Ratios first, then the target, our time and the share of the copy bandwidth."""
    console = Console(width=150)
    table = Table(title=f"their seconds / ours ({head['device']}, torch {head['torch']})")
    for name in ("case", "tokens", "values", "dense best", "all peers", "at least", "µs", "GB/s"):
        table.add_column(name, justify="left" if name in ("case", "all peers") else "right")
    for row in rows:
        peers = ", ".join(f"{n} {r:.2f}" for n, r in row["ratio"].items() if n != "dense_best")
        rate = f"{row['gigabytes_per_second']:.0f}"
        best = f"{row['ratio']['dense_best']:.2f}"
        cells = (row["case"], str(row["tokens"]), row["values"], best, peers, tables.verdict(row))
        table.add_row(*cells, f"{row['seconds'] * 1e6:.1f}", rate)
    console.print(table)
    console.print(f"copy bandwidth {head['copy_bytes_per_second'] / 1e9:.0f} GB/s, {head}")


def main() -> None:
    """Run all, print the table, write the JSON if asked."""
    arguments = tables.parser("gpu_experts", __doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("expected an NVIDIA GPU, but torch sees none; run this where there is one")
    torch.manual_seed(0)
    head = {**gpu_timing.card(), "copy_bytes_per_second": gpu_timing.copy_bandwidth()}
    with torch.inference_mode():
        few, many = ((1, 16), ()) if arguments.quick else (FEW, MANY)
        rows = list(expert_rows(few, many))
        torch.cuda.empty_cache()
        rows += block_rows(ROUTED[:1] if arguments.quick else ROUTED)
    show(rows, head)
    if arguments.json:
        write_json(arguments.json, {**head, "rows": rows})


if __name__ == "__main__":
    main()
