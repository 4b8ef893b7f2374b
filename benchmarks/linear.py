"""`python -m benchmarks.linear [--shapes 4096x1024 ...] [--tokens 1,8] [--pattern 4:8]`: one matrix.

A sparse matrix, 2:4 unless told otherwise, against dense ones. Peers hold the same matrix dense: `F.linear` in bf16 and fp32, the best dense path inside torch
(those two, bf16 without oneDNN, and both with weights packed by oneDNN beforehand), and torch's
own int8 and int4 weight-only products. Weights rotate through more memory than the caches hold.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import tables
from benchmarks.matrices import PATTERNS, nbytes, random_weights, tiles
from benchmarks.timing import interleaved
from moiety.experts import kernels
from moiety.experts.kernels import Weights

SHAPES = ((14336, 4096), (4096, 14336), (4096, 1024), (1024, 4096))
QUICK_SHAPES = ((512, 256),)
TOKENS = (1, 2, 4, 8, 16, 64, 256)
KINDS = ("bf16", "int8", "int4", "fp32")
COLD_BYTES = 128 << 20
SECONDS = 4.0
# Tokens -> at least, for bf16 values; `linear_best` is the better of both `F.linear`.
TARGETS = {
    "avx512_bf16": {
        "linear_bf16": {1: 2.9, 8: 2.4, 64: 1.4, 256: 1.2},
        "torch_best": {1: 1.8, 8: 1.6, 64: 1.25, 256: 1.1},
    },
    "avx2": {"linear_best": {1: 1.7, 8: 3.0, 64: 1.3, 256: 1.15}},
}
# Of more tokens than those, and of other patterns at any number: never slower than dense.
MANY = {"torch_best": 1.0}
OTHER_PATTERNS = {"linear_best": 1.0}

Run = Callable[[Tensor], Tensor]


class Turns:
    """One copy of a weight after the other, so that each call finds its own out of the caches."""

    def __init__(self, run: Callable[[Tensor, Any], Tensor], weight: Any, size: int) -> None:
        copies = 1 if size >= COLD_BYTES else -(-COLD_BYTES // size)
        self._run, self._turn = run, 0
        self._weights = [_copy(weight) for _ in range(copies)]

    def __call__(self, input: Tensor) -> Tensor:
        """The product with the next copy."""
        self._turn = (self._turn + 1) % len(self._weights)
        return self._run(input, self._weights[self._turn])


def _copy(weight: Any) -> Any:
    if weight is None:
        return None
    if isinstance(weight, Weights):
        # Tiled again, as a model's are when it is opened.
        if weight.is_tiled:
            return tiles(kernels.untiled(weight))
        copies = {name: _copy(getattr(weight, name)) for name in Weights._fields[:4]}
        return weight._replace(**copies)
    if isinstance(weight, tuple):
        return tuple(_copy(part) for part in weight)
    return weight.to_dense().to_mkldnn() if weight.is_mkldnn else weight.clone()


def _without_onednn(input: Tensor, weight: Tensor) -> Tensor:
    with torch.backends.mkldnn.flags(enabled=False):
        return functional.linear(input, weight)


def dense_peers(weight: Tensor, tokens: int) -> Iterator[tuple[str, Run, torch.dtype]]:
    """Name, product and dtype of every dense contender; what this machine lacks is left out."""
    half = weight.bfloat16()
    yield "linear_bf16", Turns(functional.linear, half, half.nbytes), torch.bfloat16
    yield "linear_fp32", Turns(functional.linear, weight, weight.nbytes), torch.float32
    yield "bf16_without_onednn", Turns(_without_onednn, half, half.nbytes), torch.bfloat16
    for name, dense in (("bf16", half), ("fp32", weight)):
        packed = _prepacked(dense, tokens)
        if packed is not None:
            yield f"{name}_prepacked", Turns(_pointwise, packed, dense.nbytes), dense.dtype


def _prepacked(weight: Tensor, tokens: int) -> Tensor | None:
    """The weight in oneDNN's own layout for so many tokens."""
    if not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, tokens)


def _pointwise(input: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, None, "none", [], "")


def quantised_peers(rows: int, columns: int) -> Iterator[tuple[str, Run, torch.dtype]]:
    """torch's int8 and int4 weight-only products, on random codes: for their speed."""
    aten = torch.ops.aten
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    scale = torch.full((rows,), 1e-3, dtype=torch.bfloat16)
    int8 = Turns(lambda x, w: aten._weight_int8pack_mm(x, w, scale), codes, codes.nbytes)
    yield "torch_int8", int8, torch.bfloat16
    wide = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = aten._convert_weight_to_int4pack_for_cpu(wide, 1)
    scales = torch.full((columns // 128, rows, 2), 1e-3, dtype=torch.bfloat16)
    int4 = Turns(
        lambda x, w: aten._weight_int4pack_mm_for_cpu(x, w, 128, scales), packed, packed.nbytes
    )
    yield "torch_int4", int4, torch.bfloat16


def reading(size: int) -> tuple[str, Run, torch.dtype]:
    """How long torch takes to add up as many bytes: no product can be faster than its reading."""
    numbers = torch.ones(size // 4)
    return "read", Turns(lambda _, weight: weight.sum(), numbers, size), torch.float32


def linear_rows(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    pattern: str = "2:4",
    budget: float = SECONDS,
) -> list[dict[str, Any]]:
    """Every shape, number of tokens and kind of values."""
    return [row for shape in shapes for row in _rows_of(*shape, tokens, pattern, budget)]


def _rows_of(
    rows: int, columns: int, tokens: Sequence[int], pattern: str, budget: float
) -> Iterator[dict[str, Any]]:
    stored = {kind: random_weights(1, rows, columns, kind, pattern) for kind in KINDS}
    weight = kernels.dense(stored["bf16"], 0, torch.float32)
    if pattern == "2:4":
        stored = {kind: tiles(weights) for kind, weights in stored.items()}
    ours = {kind: Turns(kernels.sparse_linear, made, nbytes(made)) for kind, made in stored.items()}
    quantised = list(quantised_peers(rows, columns))
    size = nbytes(stored["bf16"])
    rest = [*quantised, reading(size)]
    for count in tokens:
        others = tables.Others()
        dense = list(dense_peers(weight, count))
        seconds = _timed(ours, [*dense, *rest], torch.randn(count, columns), budget)
        seconds["linear_best"] = min(seconds["linear_bf16"], seconds["linear_fp32"])
        seconds["torch_best"] = min(seconds[name] for name, *_ in dense)
        for kind in KINDS:
            row = _row(f"{rows} x {columns}", count, kind, seconds, pattern)
            if kind == "bf16":
                speeds = (size / seconds[name] / 1e9 for name in (kind, "read"))
                row["gigabytes_per_second"] = dict(zip(("own", "read"), speeds, strict=True))
            yield row | {"others": others.share()}


def _timed(ours: dict[str, Turns], peers: Any, input: Tensor, budget: float) -> dict[str, float]:
    halves = {torch.float32: input, torch.bfloat16: input.bfloat16()}
    fastest = tables.machine() == "avx512_bf16"
    contenders: dict[str, Callable[[], object]] = {}
    for kind, run in ours.items():
        dtype = torch.bfloat16 if fastest and kind != "fp32" else torch.float32
        contenders[kind] = lambda r=run, d=dtype: r(halves[d])
    for name, run, dtype in peers:
        contenders[name] = lambda r=run, d=dtype: r(halves[d])
    return interleaved(contenders, rounds=21, warm_up=2, budget=budget)


PEERS = ("linear_bf16", "linear_fp32", "linear_best", "torch_best", "torch_int8", "torch_int4")


def _row(
    case: str, tokens: int, kind: str, seconds: dict[str, float], pattern: str
) -> dict[str, Any]:
    shown = {name: seconds[name] for name in (kind, *PEERS)}
    targets: dict[str, dict[int, float]] = {}
    if pattern != "2:4":
        case = f"{case}, {pattern}"
        targets = {peer: {tokens: least} for peer, least in OTHER_PATTERNS.items()}
    elif tokens > max(TOKENS):
        targets = {peer: {tokens: least} for peer, least in MANY.items()}
    else:
        targets = TARGETS.get(tables.machine(), {})
    return tables.row(case, tokens, kind, shown, targets if kind == "bf16" else {})


def main() -> None:
    """Run all, print the tables, write the JSON if asked."""
    parser = tables.parser("linear", __doc__)
    tables.in_pieces(parser)
    parser.add_argument("--shapes", nargs="+", type=tables.numbers, help="as 4096x1024")
    parser.add_argument("--tokens", type=tables.numbers, default=TOKENS, help="as 1,8,64")
    parser.add_argument("--budget", type=float, default=SECONDS, help="seconds a number of tokens")
    parser.add_argument("--pattern", choices=PATTERNS, default="2:4", help="which columns are kept")
    arguments = tables.applied(parser.parse_args())
    torch.manual_seed(0)
    shapes = arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES)
    with torch.inference_mode():
        rows = linear_rows(shapes, arguments.tokens, arguments.pattern, arguments.budget)
    tables.show(rows, f"one matrix, {arguments.pattern}")
    tables.write(rows, arguments.json, add=arguments.add)


if __name__ == "__main__":
    main()
