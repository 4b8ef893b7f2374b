"""The GPU kernels against dense PyTorch: every kind of values, odd sizes, any routes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.experts.kernels import Weights, reference
from moiety.experts.kernels.cuda.many import groupable

KINDS = [
    ("bf16", torch.bfloat16),
    ("fp16", torch.float16),
    ("int8", torch.bfloat16),
    ("int8", torch.float16),
    ("int4", torch.bfloat16),
    ("int4", torch.float16),
]


def close(output: Tensor, expected: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Within the rounding of the dtype, relative to the whole; NaN never passes.

    The interpreter cuts bf16 off instead of rounding it, which doubles the error.
    """
    assert output.dtype == dtype
    error = (output.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    one = 6e-3 if dtype == torch.bfloat16 else 1e-3
    assert float(error) < one * roundings * (1 + (not output.is_cuda))


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("rows, columns", [(1, 4), (35, 300), (33, 512)])
def test_linear_equals_dense(
    packs: Any, gpu: Any, kind: str, dtype: torch.dtype, rows: int, columns: int
) -> None:
    dense, weights = gpu.stack(packs, 1, rows, columns, kind)
    for tokens in (1, 19):
        input = torch.randn(tokens, columns, dtype=dtype, device=gpu.device)
        output = gpu.kernels.forward(input, weights)
        close(output, input.double() @ dense[0].T, dtype)


def test_strided_input_is_read_as_it_is(packs: Any, gpu: Any) -> None:
    dense, weights = gpu.stack(packs, 1, 40, 64, "bf16")
    input = torch.randn(64, 6, device=gpu.device).bfloat16().T[::2]
    close(gpu.kernels.forward(input, weights), input.double() @ dense[0].T, torch.bfloat16)


def block(
    hidden: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, act: str
) -> Tensor:
    """Every route by itself, in fp64; the inner activations rounded as the kernels round them."""
    output = torch.zeros(len(hidden), down.shape[1], dtype=torch.float64, device=hidden.device)
    for token, slot in torch.cartesian_prod(*(torch.arange(size) for size in experts.shape)):
        expert = int(experts[token, slot])
        if 0 <= expert < len(down):
            gate, up = (gate_up[expert] @ hidden[token].double()).chunk(2)
            inner = (reference.activate(gate, act) * up).to(hidden.dtype).double()
            output[token] += weights[token, slot].double() * (down[expert] @ inner)
    return output


def routes(tokens: int, active: int, experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Some routes to experts that do not exist, and none to the last one that does."""
    chosen = torch.randint(-1, experts - 1, (tokens, active), device=device)
    chosen[tokens // 2, 0] = experts
    chosen[0, -1] = 0
    return chosen, torch.rand(tokens, active, device=device)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize(("tokens", "active"), [(1, 2), (5, 2), (70, 1)])
def test_experts_equal_dense(
    packs: Any, gpu: Any, kind: str, dtype: torch.dtype, tokens: int, active: int
) -> None:
    gate_up, gate_up_weights = gpu.stack(packs, 3, 2 * 36, 68, kind)
    down, down_weights = gpu.stack(packs, 3, 68, 36, kind)
    hidden = torch.randn(tokens, 68, device=gpu.device).to(dtype)
    chosen, shares = routes(tokens, active, 3, gpu.device)
    output = gpu.kernels.forward(
        hidden, down_weights, gate_up=gate_up_weights, experts_TA=chosen, weights_TA=shares
    )
    close(output, block(hidden, gate_up, down, chosen, shares, "silu"), dtype)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_every_activation(packs: Any, gpu: Any, act: str) -> None:
    gate_up, gate_up_weights = gpu.stack(packs, 2, 2 * 40, 256, "fp16")
    down, down_weights = gpu.stack(packs, 2, 256, 40, "fp16")
    hidden = torch.randn(3, 256, device=gpu.device).half()
    chosen, shares = torch.randint(2, (3, 1), device=gpu.device), torch.ones(3, 1).to(gpu.device)
    output = gpu.kernels.forward(
        hidden,
        down_weights,
        gate_up=gate_up_weights,
        activation=act,
        experts_TA=chosen,
        weights_TA=shares,
    )
    close(output, block(hidden, gate_up, down, chosen, shares, act), torch.float16)


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize(("tokens", "active"), [(1, 3), (4, 2), (150, 2)])
def test_routed_linear_equals_dense(
    packs: Any, gpu: Any, tokens: int, active: int, based: bool
) -> None:
    dense, weights = gpu.stack(packs, 4, 40, 132, "bf16")
    input = torch.randn(tokens, 132, device=gpu.device).bfloat16()
    chosen, shares = routes(tokens, active, 4, gpu.device)
    base = torch.randn(tokens, 40, device=gpu.device).bfloat16() if based else None
    output = gpu.kernels.forward(input, weights, experts_TA=chosen, weights_TA=shares, base_TO=base)
    full = torch.zeros(tokens, 6, dtype=torch.float64, device=gpu.device)
    full.scatter_add_(1, (chosen + 1), shares.double())
    expected = torch.einsum("te,eoi,ti->to", full[:, 1:5], dense, input.double())
    close(output, expected + (0 if base is None else base.double()), torch.bfloat16)


def test_no_tokens_give_nothing(packs: Any, gpu: Any) -> None:
    _, weights = gpu.stack(packs, 1, 8, 16, "bf16")
    assert gpu.kernels.forward(torch.empty(0, 16).bfloat16(), weights).shape == (0, 8)


def test_many_tokens_go_through_dense_matrices(
    packs: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moiety.experts.kernels.cuda.forward.MOST_TOKENS_DENSE", 2)
    gate_up, gate_up_weights = gpu.stack(packs, 2, 2 * 36, 68, "int8")
    down, down_weights = gpu.stack(packs, 2, 68, 36, "int8")
    hidden = torch.randn(9, 68, device=gpu.device).bfloat16()
    chosen, shares = routes(9, 1, 2, gpu.device)
    routing = {"experts_TA": chosen, "weights_TA": shares}
    output = gpu.kernels.forward(hidden, down_weights, gate_up=gate_up_weights, **routing)
    close(output, block(hidden, gate_up, down, chosen, shares, "silu"), torch.bfloat16)
    output = gpu.kernels.forward(hidden, gate_up_weights.one(1))
    close(output, hidden.double() @ gate_up[1].T, torch.bfloat16)


@pytest.mark.parametrize("most", [0, 2**31])
def test_many_routes_are_grouped_or_go_one_by_one(
    packs: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("moiety.experts.kernels.cuda.forward.MOST_TOKENS_DENSE", 2)
    monkeypatch.setattr("moiety.experts.kernels.cuda.many.MOST_BYTES", most)
    gate_up, gate_up_weights = gpu.stack(packs, 3, 2 * 40, 72, "bf16")
    down, down_weights = gpu.stack(packs, 3, 72, 40, "bf16")
    hidden = torch.randn(19, 72, device=gpu.device).bfloat16()
    chosen, shares = routes(19, 2, 3, gpu.device)
    routing = {"experts_TA": chosen, "weights_TA": shares}
    assert groupable([gate_up_weights, down_weights], torch.bfloat16) == (most > 0)
    output = gpu.kernels.forward(hidden, down_weights, gate_up=gate_up_weights, **routing)
    expected = block(hidden, gate_up, down, chosen, shares, "silu")
    close(output, expected, torch.bfloat16, roundings=2)
    base = torch.randn(19, 72, device=gpu.device).bfloat16()
    inner = torch.randn(19, 40, device=gpu.device).bfloat16()
    based = gpu.kernels.forward(inner, down_weights, **routing, base_TO=base)
    alone = gpu.kernels.forward(inner, down_weights, **routing)
    close(based, alone.double() + base.double(), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8", "int4"])
def test_matrices_can_be_dense_again(packs: Any, gpu: Any, kind: str, dtype: torch.dtype) -> None:
    dense, weights = gpu.stack(packs, 2, 35, 300, kind)
    expected = dense.to(torch.float32).to(dtype)
    one_bit = 2**-7 if dtype == torch.bfloat16 and gpu.device.type == "cpu" else 0
    torch.testing.assert_close(gpu.kernels.expand(weights, dtype), expected, rtol=one_bit, atol=0)


def test_what_is_not_theirs_is_left_to_others(packs: Any, gpu: Any) -> None:
    _, weights = gpu.stack(packs, 1, 8, 16, "bf16")
    assert gpu.kernels.forward(torch.ones(1, 16, device=gpu.device), weights) is None
    assert gpu.kernels.forward(torch.ones(1, 16, device=gpu.device).half(), weights) is None
    _, values, mask, _ = packs.stacked(1, 8, 16, "1:4", "bf16")
    assert gpu.kernels.tile(Weights(values, mask, None, None, 8, 16, "bf16")) is None


def test_other_patterns_of_as_many_values_are_refused(packs: Any, gpu: Any) -> None:
    _, values, mask, _ = packs.stacked(1, 8, 16, "4:8", "bf16")
    with pytest.raises(ValueError, match="expected 2:4 matrices for planes"):
        gpu.kernels.tile(Weights(values, mask, None, None, 8, 16, "bf16"))
