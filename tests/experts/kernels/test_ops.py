"""The sparse ops against dense PyTorch: values, gradients, odd sizes, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moiety.experts import Packed, kernels
from moiety.experts.kernels import Weights, layouts, reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-9}
STORED = [
    ("2:4", "fp32"),
    ("2:4", "bf16"),
    ("2:4", "int8"),
    ("2:4", "int4"),
    ("1:4", "int4"),
    ("3:4", "fp16"),
    ("0.5", "fp32"),
    ("0.5", "int8"),
    ("0.3", "int4"),
    ("dense", "bf16"),
]


def weights_of(packed: Packed) -> Weights:
    return kernels.packed(packed.values, packed.mask_OB, packed.in_features, packed.scale_OG)


def stack_of(tensors: Any, width: int) -> Weights:
    values, mask, scale = tensors
    return kernels.packed(values, mask, width, scale)


def halves(gate_up: Weights) -> Weights:
    """Gate and up as matrices of their own, where the layout allows."""
    return gate_up.regrouped(2 * gate_up.stack) if gate_up.values.dim() == 3 else gate_up


def in_tiles(weights: Weights) -> Weights:
    """Tiles, or the same weights where those cannot be."""
    return kernels.tiled(weights) or weights


@pytest.fixture(autouse=True)
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that an op which skips an element fails."""
    torch.manual_seed(0)
    empty = torch.empty

    def filled(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", filled)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("width", [4, 12, 136])
@pytest.mark.parametrize(("pattern", "values"), STORED)
def test_sparse_linear_equals_dense(
    packs: Any, shape: tuple[int, ...], width: int, pattern: str, values: str
) -> None:
    dense, packed = packs.packed(9, width, pattern, values)
    input = torch.randn(*shape, width, requires_grad=True)
    output = kernels.sparse_linear(input, weights_of(packed))
    expected = functional.linear(input, dense.float())
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(expected)
    [ours] = torch.autograd.grad(output, input, gradient)
    [theirs] = torch.autograd.grad(expected, input, gradient)
    torch.testing.assert_close(ours, theirs)


def test_integers_are_multiplied_in_fp32_and_rounded_once(packs: Any) -> None:
    dense, packed = packs.packed(9, 24, "2:4", "int8")
    identity = torch.eye(24, dtype=torch.bfloat16)
    output = kernels.sparse_linear(identity, weights_of(packed))
    assert torch.equal(output.T, dense.bfloat16())


def dense_block(
    hidden: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, act: str
) -> Tensor:
    """Every expert on every token, then the routed sum: slow and plain."""
    both = torch.einsum("td,ehd->teh", hidden, gate_up.to(hidden.dtype))
    gate, up = both.chunk(2, dim=-1)
    inner = reference.activate(gate, act) * up
    result = torch.einsum("tef,edf->ted", inner, down.to(hidden.dtype))
    full = torch.zeros(len(hidden), len(gate_up), dtype=weights.dtype)
    full = full.scatter_add(1, experts, weights)
    return torch.einsum("te,ted->td", full.to(hidden.dtype), result)


CASES = [(act, "2:4", "fp32") for act in reference.ACTIVATIONS]
CASES += [("silu", pattern, values) for pattern, values in (*STORED[1:], ("4:8", "fp16"))]


@pytest.mark.parametrize(("act", "pattern", "values"), CASES)
@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sparse_experts_equals_dense(
    packs: Any, act: str, pattern: str, values: str, tokens: int, dtype: torch.dtype
) -> None:
    gate_up, *gate_up_packed = packs.stacked(3, 48, 16, pattern, values)
    down, *down_packed = packs.stacked(3, 16, 24, pattern, values)
    hidden = torch.randn(tokens, 16).to(dtype).requires_grad_()
    experts = torch.rand(tokens, 3).topk(2).indices
    weights = torch.rand(tokens, 2, requires_grad=True)
    stacks = (stack_of(gate_up_packed, 16), stack_of(down_packed, 24))
    output = kernels.sparse_experts(hidden, *stacks, experts, weights, act)
    expected = dense_block(hidden, gate_up, down, experts, weights, act)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn_like(expected)
    ours = torch.autograd.grad(output, (hidden, weights), gradient)
    theirs = torch.autograd.grad(expected, (hidden, weights), gradient)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=10 * tolerance, atol=10 * tolerance)


def block(packs: Any, pattern: str = "2:4", values: str = "fp32", tokens: int = 5) -> list[Any]:
    """Arguments of `sparse_experts`, all of them."""
    return [
        torch.randn(tokens, 8, requires_grad=True),
        stack_of(packs.stacked(2, 16, 8, pattern, values)[1:], 8),
        stack_of(packs.stacked(2, 8, 8, pattern, values)[1:], 8),
        torch.randint(2, (tokens, 1)),
        torch.rand(tokens, 1, requires_grad=True),
        "silu",
    ]


def test_an_expert_that_is_not_here_adds_nothing(packs: Any) -> None:
    arguments = block(packs)
    arguments[3] = torch.full((5, 1), 2)
    assert not kernels.sparse_experts(*arguments).any()


SOME = [("2:4", "fp32"), ("0.5", "int8"), ("2:4", "int4")]


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("pattern", "values"), SOME)
def test_ops_are_registered_properly(packs: Any, pattern: str, values: str, tiled: bool) -> None:
    hidden, gate_up, down, experts, weights, activation = block(packs, pattern, values)
    linear = weights_of(packs.packed(8, 8, pattern, values)[1])
    if tiled:
        gate_up, down, linear = (in_tiles(w) for w in (halves(gate_up), down, linear))
    ops = torch.ops.moiety
    arguments = (hidden, *gate_up, *down, experts, weights, activation)
    torch.library.opcheck(ops.sparse_experts.default, arguments)
    torch.library.opcheck(ops.sparse_linear.default, (hidden, *linear))
    base = torch.randn(5, 8, requires_grad=True)
    arguments = (hidden, *down, experts, weights, base)
    torch.library.opcheck(ops.sparse_routed_linear.default, arguments)


@pytest.mark.parametrize(("pattern", "values"), SOME)
def test_ops_compile_without_graph_breaks(packs: Any, pattern: str, values: str) -> None:
    arguments = block(packs, pattern, values)
    compiled = torch.compile(kernels.sparse_experts, fullgraph=True, backend="aot_eager")
    expected = kernels.sparse_experts(*arguments)
    output = compiled(*arguments)
    torch.testing.assert_close(output, expected)
    leaves = (arguments[0], arguments[4])
    ours, theirs = (torch.autograd.grad(o.sum(), leaves) for o in (output, expected))
    torch.testing.assert_close(ours, theirs)
    compiled = torch.compile(kernels.sparse_linear, fullgraph=True, backend="aot_eager")
    linear = (arguments[0], weights_of(packs.packed(6, 8, pattern, values)[1]))
    torch.testing.assert_close(compiled(*linear), kernels.sparse_linear(*linear))
    routed = (arguments[0], arguments[2], *arguments[3:5])
    compiled = torch.compile(kernels.sparse_routed_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*routed), kernels.sparse_routed_linear(*routed))


def test_wrong_shapes_and_dtypes_are_refused(packs: Any) -> None:
    packed = packs.packed(6, 8, "2:4", "fp32")[1]
    values, mask = packed.values, packed.mask_OB
    scale = torch.ones(6, 1, dtype=torch.bfloat16)
    cases: list[tuple[str, Any]] = [
        ("expected a mask", (values, mask[:, :0], 8)),
        ("expected a mask", (values, mask[None, None], 8)),
        ("uint8 mask", (values, mask.int(), 8)),
        ("expected packed values", (values.int(), mask, 8)),
        ("expected values", (values[:5], mask, 8)),
        ("expected values", (torch.randn(6, 9), mask, 8)),
        ("expected values", (torch.randn(49), mask, 8)),
        ("expected no scale", (values, mask, 8, scale)),
        ("expected a bfloat16 scale.*none", (values.to(torch.int8), mask, 8)),
        ("expected a bfloat16 scale", (values.to(torch.int8), mask, 8, scale.float())),
        ("expected a bfloat16 scale", (values.to(torch.int8), mask, 8, scale[:3])),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            kernels.packed(*arguments)
    weights = weights_of(packed)
    with pytest.raises(ValueError, match="width 8"):
        kernels.sparse_linear(torch.randn(3, 9), weights)
    with pytest.raises(ValueError, match="floating-point tensor"):
        kernels.sparse_linear(torch.ones(3, 8, dtype=torch.int64), weights)


def test_wrong_routes_and_stacks_are_refused(packs: Any) -> None:
    hidden, gate_up, down, experts, weights, _ = block(packs)
    cases: list[tuple[str, Any]] = [
        ("activation", (hidden, gate_up, down, experts, weights, "swish7")),
        ("gate and up", (hidden, down, down, experts, weights)),
        ("tokens, active", (hidden, gate_up, down, experts, weights[:2])),
        ("must be integers", (hidden, gate_up, down, experts.float(), weights)),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            kernels.sparse_experts(*arguments)
    with pytest.raises(ValueError, match="expected a base"):
        kernels.sparse_routed_linear(hidden, down, experts, weights, hidden[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(("pattern", "values"), SOME)
def test_sparse_routed_linear_equals_dense(
    packs: Any, pattern: str, values: str, with_base: bool, dtype: torch.dtype
) -> None:
    matrices, *packed = packs.stacked(3, 20, 16, pattern, values)
    input = torch.randn(7, 16).to(dtype).requires_grad_()
    experts = torch.rand(7, 3).topk(2).indices
    weights = torch.rand(7, 2, requires_grad=True)
    base = torch.randn(7, 20).to(dtype).requires_grad_() if with_base else None
    output = kernels.sparse_routed_linear(input, stack_of(packed, 16), experts, weights, base)
    full = torch.zeros(7, 3).scatter_add(1, experts, weights).to(dtype)
    expected = torch.einsum("te,eoi,ti->to", full, matrices.to(dtype), input)
    expected = expected if base is None else expected + base
    tolerance = {torch.float16: 1e-2, **TOLERANCE}[dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn_like(expected)
    leaves = (input, weights) if base is None else (input, weights, base)
    ours = torch.autograd.grad(output, leaves, gradient)
    theirs = torch.autograd.grad(expected, leaves, gradient)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=10 * tolerance, atol=10 * tolerance)


def test_without_the_compiled_kernels_the_reference_takes_over(
    packs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = block(packs)
    expected = kernels.sparse_experts(*arguments)
    monkeypatch.setattr(layouts, "library", lambda: None)
    torch.testing.assert_close(kernels.sparse_experts(*arguments), expected)
    assert kernels.tiled(arguments[2]) is None


def test_a_mapped_file_is_multiplied_where_it_lies(packs: Any, tmp_path: Path) -> None:
    dense, packed = packs.packed(16, 64, "4:8", "fp32")
    parts = {"values": packed.values, "mask": packed.mask_OB}
    mapped = {}
    for name, tensor in parts.items():
        (tmp_path / name).write_bytes(tensor.numpy().tobytes())
        size, dtype = tensor.numel(), tensor.dtype
        flat = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)
        mapped[name] = flat.view(tensor.shape)
    input = torch.randn(3, 64)
    weights = kernels.packed(mapped["values"], mapped["mask"], 64)
    torch.testing.assert_close(kernels.sparse_linear(input, weights), input @ dense.T)
    with (tmp_path / "values").open("r+b") as file:
        file.write(bytes(packed.values.numel() * 4))
    assert not kernels.sparse_linear(input, weights).any()


def test_a_matrix_without_rows_gives_nothing() -> None:
    weights = kernels.packed(torch.empty(1, 0, 8), torch.empty(1, 0, 2, dtype=torch.uint8), 16)
    for tokens in (1, 200):
        assert kernels.sparse_linear(torch.randn(tokens, 16), weights).shape == (tokens, 0)
