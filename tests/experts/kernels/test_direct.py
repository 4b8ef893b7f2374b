"""Ops go past torch's dispatcher only where nothing would miss them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from moiety.experts import kernels
from moiety.experts.kernels.direct import unwatched
from moiety.experts.modules import SparseLinear
from moiety.experts.pattern import Pattern

Call = Callable[[Tensor], Tensor]
NAMES = ("sparse_linear", "dense_linear", "sparse_routed_linear", "sparse_experts")


@pytest.fixture(params=NAMES)
def called(packs: Any, request: pytest.FixtureRequest) -> tuple[str, Call]:
    """An op's name, and a call of it with an input (tokens, 64)."""

    def stack(count: int, rows: int, columns: int) -> kernels.Weights:
        torch.manual_seed(0)
        _, values, mask, _ = packs.stacked(count, rows, columns, "2:4", "fp32")
        return kernels.packed(values, mask, columns)

    experts, weights = torch.tensor([[0, 1], [1, 0], [1, 1]]), torch.rand(3, 2)
    one, many, down, above = stack(1, 32, 64), stack(2, 32, 64), stack(2, 64, 32), stack(2, 64, 64)
    calls: dict[str, Call] = {
        "sparse_linear": lambda x: kernels.sparse_linear(x, one),
        "dense_linear": lambda x: kernels.dense_linear(x, torch.ones(32, 64)),
        "sparse_routed_linear": lambda x: kernels.sparse_routed_linear(x, many, experts, weights),
        "sparse_experts": lambda x: kernels.sparse_experts(x, above, down, experts, weights),
    }
    return request.param, calls[request.param]


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_without_anyone_who_looks_the_result_is_the_ops(called: tuple[str, Call]) -> None:
    name, call = called
    x = torch.randn(3, 64)
    assert unwatched(x)
    plain = call(x)
    with Seen() as seen:
        assert torch.equal(call(x), plain)
    assert f"moiety.{name}.default" in seen.names
    with torch.no_grad():
        assert torch.equal(call(x.requires_grad_()), plain)
    assert not plain.requires_grad


def test_profiles_and_traces_have_the_op(called: tuple[str, Call]) -> None:
    name, call = called
    x = torch.randn(3, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call(x)
    assert f"moiety::{name}" in {event.key for event in profiled.key_averages()}
    traced = make_fx(call)(x)
    assert any(name in str(node.target) for node in traced.graph.nodes)
    assert torch.equal(traced(x), call(x))


def test_derivatives_are_not_lost(called: tuple[str, Call]) -> None:
    _, call = called
    x = torch.randn(3, 64, requires_grad=True)
    assert not unwatched(x)
    call(x).sum().backward()
    assert x.grad is not None and x.grad.norm() > 0
    with pytest.raises(RuntimeError, match="functorch"):  # which torch has not for custom ops
        torch.func.grad(lambda x: call(x).sum())(x.detach())
    with torch.inference_mode():
        assert torch.equal(call(x), call(x.detach()))


def test_other_tensors_are_theirs_to_handle() -> None:
    class Own(Tensor):
        pass

    assert not unwatched(torch.randn(2, 2).as_subclass(Own))
    assert unwatched(torch.nn.Parameter(torch.randn(2, 2), requires_grad=False), None)
    with torch.device("cpu"):
        assert not unwatched(torch.randn(2, 2))


@pytest.mark.parametrize("values", ["bf16", "int4"])
def test_meta_tensors_have_only_shapes(packs: Any, values: str) -> None:
    _, packed = packs.packed(32, 64, "2:4", values)
    for tiled in (False, True):
        linear = SparseLinear(64, 32, Pattern.parse("2:4"), values)
        linear.load_state_dict(packed.tensors("weight"))
        if tiled:
            linear.prepare()
        output = linear.to("meta")(torch.empty(3, 64, device="meta"))
        assert output.is_meta and output.shape == (3, 32)


def test_tensors_that_stand_for_other_bytes(packs: Any) -> None:
    own: Any = torch
    torch.manual_seed(0)
    _, values, mask, _ = packs.stacked(1, 32, 64, "2:4", "fp32")
    weights = kernels.packed(values, mask, 64)
    weights = kernels.tiled(weights) or weights
    x = torch.randn(3, 64)
    expected = kernels.sparse_linear(x, weights)
    assert torch.equal(kernels.sparse_linear(own._neg_view(x), weights), -expected)
    assert not kernels.sparse_linear(own._efficientzerotensor((3, 64)), weights).any()


@pytest.mark.usefixtures("compiled")
def test_tiles_that_are_not_contiguous_are_copied(packs: Any) -> None:
    torch.manual_seed(0)
    _, values, mask, _ = packs.stacked(2, 32, 64, "2:4", "bf16")
    tiles = kernels.tiled(kernels.packed(values, mask, 64))
    assert tiles is not None
    strided = tiles._replace(values=tiles.values.t().contiguous().t())
    x = torch.randn(3, 64)
    assert torch.equal(kernels.sparse_linear(x, strided), kernels.sparse_linear(x, tiles))
