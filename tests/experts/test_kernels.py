"""The sparse ops against dense PyTorch: values, gradients, odd sizes, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moiety.experts import Pattern, kernels, pack
from moiety.experts.kernels import reference

TWO_FOUR = Pattern(2, 4)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-9}


def stack(experts: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Dense (E, rows, columns) and its packed values and mask."""
    weight = torch.randn(experts, rows, columns) / columns**0.5
    weight = (weight * TWO_FOUR.mask(weight.abs())).to(dtype)
    packed = [pack(one, TWO_FOUR) for one in weight]
    return (
        weight,
        torch.stack([p.values_OK for p in packed]),
        torch.stack([p.mask_OB for p in packed]),
    )


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
@pytest.mark.parametrize("width", [4, 12, 64, 68])
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16])
def test_sparse_linear_equals_dense(
    shape: tuple[int, ...], width: int, values: torch.dtype
) -> None:
    dense, packed, mask = (t[0] for t in stack(1, 9, width, values))
    input = torch.randn(*shape, width, requires_grad=True)
    output = kernels.sparse_linear(input, packed, mask, width)
    expected = functional.linear(input, dense.float())
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(expected)
    [ours] = torch.autograd.grad(output, input, gradient)
    [theirs] = torch.autograd.grad(expected, input, gradient)
    torch.testing.assert_close(ours, theirs)


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


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sparse_experts_equals_dense(act: str, tokens: int, dtype: torch.dtype) -> None:
    gate_up, gate_up_values, gate_up_mask = stack(3, 2 * 20, 12, torch.float32)
    down, down_values, down_mask = stack(3, 12, 20, torch.float32)
    hidden = torch.randn(tokens, 12).to(dtype).requires_grad_()
    experts = torch.rand(tokens, 3).topk(2).indices
    weights = torch.rand(tokens, 2, requires_grad=True)
    output = kernels.sparse_experts(
        hidden, gate_up_values, gate_up_mask, down_values, down_mask, experts, weights, act
    )
    expected = dense_block(hidden, gate_up, down, experts, weights, act)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn_like(expected)
    ours = torch.autograd.grad(output, (hidden, weights), gradient)
    theirs = torch.autograd.grad(expected, (hidden, weights), gradient)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=10 * tolerance, atol=10 * tolerance)


def block(tokens: int = 5) -> list[Any]:
    _, gate_up_values, gate_up_mask = stack(2, 16, 8, torch.float32)
    _, down_values, down_mask = stack(2, 8, 8, torch.float32)
    experts = torch.randint(2, (tokens, 1))
    return [
        torch.randn(tokens, 8, requires_grad=True),
        gate_up_values,
        gate_up_mask,
        down_values,
        down_mask,
        experts,
        torch.rand(tokens, 1, requires_grad=True),
    ]


def test_an_expert_that_is_not_here_adds_nothing() -> None:
    tensors = block()
    tensors[5] = torch.full((5, 1), 2)
    assert not kernels.sparse_experts(*tensors).any()


def test_ops_are_registered_properly() -> None:
    torch.library.opcheck(torch.ops.moiety.sparse_experts.default, (*block(), "silu"))
    _, values, mask = (t[0] for t in stack(1, 6, 8, torch.float32))
    arguments = (torch.randn(3, 8, requires_grad=True), values, mask, 8)
    torch.library.opcheck(torch.ops.moiety.sparse_linear.default, arguments)


def test_ops_compile_without_graph_breaks() -> None:
    tensors = block()
    compiled = torch.compile(kernels.sparse_experts, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), kernels.sparse_experts(*tensors))


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    _, values, mask = (t[0] for t in stack(1, 6, 8, torch.float32))
    with pytest.raises(ValueError, match="width 8"):
        kernels.sparse_linear(torch.randn(3, 9), values, mask, 8)
    with pytest.raises(ValueError, match="needs a mask"):
        kernels.sparse_linear(torch.randn(3, 8), values, mask[:, :0], 8)
    with pytest.raises(ValueError, match="uint8"):
        kernels.sparse_linear(torch.randn(3, 8), values, mask.int(), 8)
    with pytest.raises(ValueError, match="floating-point tensor"):
        kernels.sparse_linear(torch.ones(3, 8, dtype=torch.int64), values, mask, 8)
    tensors = block()
    with pytest.raises(ValueError, match="activation"):
        kernels.sparse_experts(*tensors[:7], activation="swish7")
    tensors[6] = tensors[6][:2]
    with pytest.raises(ValueError, match="tokens, active"):
        kernels.sparse_experts(*tensors)
