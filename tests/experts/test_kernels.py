"""The sparse ops against dense PyTorch: values, gradients, odd sizes, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moiety.experts import kernels
from moiety.experts.kernels import reference

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
    output = kernels.sparse_linear(input, packed.values, packed.mask_OB, width, packed.scale_OG)
    expected = functional.linear(input, dense.float())
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(expected)
    [ours] = torch.autograd.grad(output, input, gradient)
    [theirs] = torch.autograd.grad(expected, input, gradient)
    torch.testing.assert_close(ours, theirs)


def test_integers_are_multiplied_in_fp32_and_rounded_once(packs: Any) -> None:
    dense, packed = packs.packed(9, 24, "2:4", "int8")
    identity = torch.eye(24, dtype=torch.bfloat16)
    output = kernels.sparse_linear(identity, packed.values, packed.mask_OB, 24, packed.scale_OG)
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
    gate_up, gate_up_values, gate_up_mask, gate_up_scale = packs.stacked(3, 48, 16, pattern, values)
    down, down_values, down_mask, down_scale = packs.stacked(3, 16, 24, pattern, values)
    hidden = torch.randn(tokens, 16).to(dtype).requires_grad_()
    experts = torch.rand(tokens, 3).topk(2).indices
    weights = torch.rand(tokens, 2, requires_grad=True)
    packed = (gate_up_values, gate_up_mask, down_values, down_mask)
    output = kernels.sparse_experts(
        hidden, *packed, experts, weights, act, gate_up_scale, down_scale
    )
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
    _, gate_up_values, gate_up_mask, gate_up_scale = packs.stacked(2, 16, 8, pattern, values)
    _, down_values, down_mask, down_scale = packs.stacked(2, 8, 8, pattern, values)
    return [
        torch.randn(tokens, 8, requires_grad=True),
        gate_up_values,
        gate_up_mask,
        down_values,
        down_mask,
        torch.randint(2, (tokens, 1)),
        torch.rand(tokens, 1, requires_grad=True),
        "silu",
        gate_up_scale,
        down_scale,
    ]


def test_an_expert_that_is_not_here_adds_nothing(packs: Any) -> None:
    arguments = block(packs)
    arguments[5] = torch.full((5, 1), 2)
    assert not kernels.sparse_experts(*arguments).any()


@pytest.mark.parametrize(("pattern", "values"), [("2:4", "fp32"), ("0.5", "int8"), ("2:4", "int4")])
def test_ops_are_registered_properly(packs: Any, pattern: str, values: str) -> None:
    torch.library.opcheck(
        torch.ops.moiety.sparse_experts.default, tuple(block(packs, pattern, values))
    )
    _, packed = packs.packed(6, 8, pattern, values)
    input = torch.randn(3, 8, requires_grad=True)
    arguments = (input, packed.values, packed.mask_OB, 8, packed.scale_OG)
    torch.library.opcheck(torch.ops.moiety.sparse_linear.default, arguments)


@pytest.mark.parametrize(("pattern", "values"), [("2:4", "fp32"), ("0.5", "int8"), ("2:4", "int4")])
def test_ops_compile_without_graph_breaks(packs: Any, pattern: str, values: str) -> None:
    arguments = block(packs, pattern, values)
    compiled = torch.compile(kernels.sparse_experts, fullgraph=True, backend="aot_eager")
    expected = kernels.sparse_experts(*arguments)
    output = compiled(*arguments)
    torch.testing.assert_close(output, expected)
    leaves = (arguments[0], arguments[6])
    ours, theirs = (torch.autograd.grad(o.sum(), leaves) for o in (output, expected))
    torch.testing.assert_close(ours, theirs)
    _, packed = packs.packed(6, 8, pattern, values)
    compiled = torch.compile(kernels.sparse_linear, fullgraph=True, backend="aot_eager")
    linear = (arguments[0], packed.values, packed.mask_OB, 8, packed.scale_OG)
    torch.testing.assert_close(compiled(*linear), kernels.sparse_linear(*linear))


def test_wrong_shapes_and_dtypes_are_refused(packs: Any) -> None:
    packed = packs.packed(6, 8, "2:4", "fp32")[1]
    input, values, mask = torch.randn(3, 8), packed.values, packed.mask_OB
    scale = torch.ones(6, 1, dtype=torch.bfloat16)
    cases: list[tuple[str, Any]] = [
        ("width 8", (torch.randn(3, 9), values, mask, 8)),
        ("floating-point tensor", (torch.ones(3, 8, dtype=torch.int64), values, mask, 8)),
        ("needs a mask", (input, values, mask[:, :0], 8)),
        ("needs a mask", (input, values, mask[None], 8)),
        ("uint8 mask", (input, values, mask.int(), 8)),
        ("int8 or uint8", (input, values.int(), mask, 8)),
        ("needs values", (input, values[:5], mask, 8)),
        ("needs values", (input, torch.randn(6, 9), mask, 8)),
        ("needs values", (input, torch.randn(49), mask, 8)),
        ("takes no scale", (input, values, mask, 8, scale)),
        ("needs a bfloat16 scale.*none", (input, values.to(torch.int8), mask, 8)),
        ("needs a bfloat16 scale", (input, values.to(torch.int8), mask, 8, scale.float())),
        ("needs a bfloat16 scale", (input, values.to(torch.int8), mask, 8, scale[:3])),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            kernels.sparse_linear(*arguments)
    arguments = block(packs)
    with pytest.raises(ValueError, match="activation"):
        kernels.sparse_experts(*arguments[:7], activation="swish7")
    with pytest.raises(ValueError, match="down has integer values"):
        kernels.sparse_experts(
            *(a.to(torch.int8) if i == 3 else a for i, a in enumerate(arguments))
        )
    arguments[6] = arguments[6][:2]
    with pytest.raises(ValueError, match="tokens, active"):
        kernels.sparse_experts(*arguments)
