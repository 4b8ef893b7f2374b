"""The compiled gate does what the plain way of routers and steps does, and is what decodes."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from moiety.routers import Flow, Router, RouterSpec, native

EXPERTS, BATCH = 5, 3
KINDS: dict[str, dict[str, Any]] = {
    "token": {},
    "several": {"top_k": 2},
    "soft": {"top_k": 5, "context": (4,)},
    "context": {"context": (4, 16, "mean")},
    "mass": {"top_k": 4, "mass": 0.6, "context": (8,)},
    "absolute": {"top_k": 2, "score": "absolute", "context": (8, "mean")},
    "sigmoid": {"kind": "sigmoid", "top_k": 2, "context": (4, 8)},
    "sigmoid mass": {"kind": "sigmoid", "top_k": 4, "mass": 0.7},
    "sigmoid alone": {"kind": "sigmoid"},
    "sequence": {"kind": "sequence", "top_k": 2},
}
compiled_only = pytest.mark.skipif(native.library() is None, reason="the gate is not compiled")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised tensors hold NaN and the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Model:
    """Two routers that share a flow, a cache, and what they were given."""

    def __init__(self, width: int, dtype: torch.dtype, spec: RouterSpec) -> None:
        torch.manual_seed(0)
        self.flow, self.cache = Flow(spec.horizons), DynamicCache()
        self.routers = [Router(width, EXPERTS, spec, self.flow, number) for number in range(2)]
        for router in self.routers:
            assert router.weight is not None
            torch.nn.init.normal_(router.weight)
            if spec.kind == "sigmoid":
                router.get_buffer("selection_bias").normal_()
            router.to(dtype)

    def states(self) -> Tensor:
        """What its routers remember, after each token."""
        states: Any = self.cache.layers[-1]
        return states.keys

    @torch.no_grad()
    def __call__(
        self, hidden_BSD: Tensor, mask_BS: Tensor | None, position_BS: Tensor | None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Every router's logits, weights and experts."""
        self.flow.begin(None, mask_BS)
        self.flow.enter(hidden_BSD, self.cache, position_BS)
        found = [router(hidden_BSD * (1 + n)) for n, router in enumerate(self.routers)]
        self.flow.end()
        return found


def run(spec: RouterSpec, width: int, dtype: torch.dtype, weight: torch.dtype) -> list[Any]:
    """Routes of a text with padding and a second document, token by token, and the states."""
    generator = torch.Generator().manual_seed(width)
    hidden_BSD = 3 * torch.randn(BATCH, 12, width, generator=generator).to(dtype)
    mask_BS = torch.ones(BATCH, 12, dtype=torch.int64)
    mask_BS[0, :3] = 0
    mask_BS[1, 8] = 0
    position_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    position_BS[2, 7:] -= 7
    model = Model(width, weight, spec)
    found: list[Any] = [model(hidden_BSD[:, :5], mask_BS[:, :5], position_BS[:, :5])]
    for at in range(5, 12):
        here = slice(at, at + 1)
        found.append(model(hidden_BSD[:, here], mask_BS[:, : at + 1], position_BS[:, here]))
    return [*found, model.states() if spec.horizons else ()]


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)


@compiled_only
@pytest.mark.parametrize("width", [16, 33, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_the_plain_way_gives(
    kind: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = RouterSpec(**KINDS[kind])
    types = (torch.float32, torch.float32)
    found = run(spec, width, *types)
    without(monkeypatch)
    torch.testing.assert_close(found, run(spec, width, *types))


@compiled_only
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["token", "several", "context", "sequence"])
def test_it_rounds_where_the_plain_way_does(
    kind: str, dtype: torch.dtype, weight: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = RouterSpec(**KINDS[kind])
    found = run(spec, 40, dtype, weight)
    without(monkeypatch)
    plain = run(spec, 40, dtype, weight)
    # A sum next to the middle of two bf16 numbers may be rounded either way.
    close = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, plain, rtol=close, atol=close)
    if dtype == torch.bfloat16 and kind == "token":
        logits = [step[0][0] for step in found[:-1]]
        same = [torch.equal(one, other[0][0]) for one, other in zip(logits, plain, strict=False)]
        assert sum(same) > len(same) / 2


class Counted:
    """The library, counting its calls."""

    def __init__(self) -> None:
        self.calls, self._library = 0, native.library()

    def route(self, *arguments: Any) -> Any:
        self.calls += 1
        assert self._library is not None
        return self._library.route(*arguments)


@compiled_only
@pytest.mark.parametrize("kind", KINDS)
def test_every_learned_gate_decodes_with_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    monkeypatch.setattr(native, "library", lambda: counted)
    run(RouterSpec(**KINDS[kind]), 16, torch.float32, torch.float32)
    assert counted.calls == 2 * 7


@compiled_only
def test_the_plain_way_does_what_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    monkeypatch.setattr(native, "library", lambda: counted)
    router = Router(16, EXPERTS, RouterSpec())
    token = torch.randn(2, 1, 16)
    logits_TE, *_ = router(token)
    assert logits_TE.requires_grad
    with torch.no_grad():
        router(token[:, 0])
        router(token.expand(2, 3, 16))
        router(token.half())
        router.double()(token.double())
        Router(16, EXPERTS, RouterSpec(context=(4,)))(token)
        Router(16, EXPERTS, RouterSpec(kind="uniform"))(token)
    assert counted.calls == 0
    with torch.no_grad():
        router.float()(token)
    assert counted.calls == 1


def test_both_ways_may_take_turns_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one router is on a GPU and the next is not."""
    spec, width = RouterSpec(top_k=2, context=(4, "mean")), 16
    hidden_BSD = torch.randn(BATCH, 6, width, generator=torch.Generator().manual_seed(0))
    states: list[Tensor] = []
    for plain in ((), (0,), (1,), (0, 1)):
        model = Model(width, torch.float32, spec)
        for number in plain:
            model.routers[number]._shape = None
        for at in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)):
            model(hidden_BSD[:, at], None, None)
        states.append(model.states())
    for state in states[1:]:
        torch.testing.assert_close(state, states[0])


@compiled_only
def test_a_router_that_is_passed_over_keeps_its_means() -> None:
    model = Model(16, torch.float32, RouterSpec(context=(4,)))
    hidden_BSD = torch.randn(BATCH, 4, 16, generator=torch.Generator().manual_seed(0))
    model(hidden_BSD[:, :3], None, None)
    model.routers.pop()
    model(hidden_BSD[:, 3:], None, None)
    before, after = model.states()[:, 0, -2:, :-2].unbind(1)
    assert torch.equal(after[:, EXPERTS:], before[:, EXPERTS:])
    assert not torch.isclose(after[:, :EXPERTS], before[:, :EXPERTS]).any()


def test_a_router_is_copied_and_pickled() -> None:
    router = Router(16, EXPERTS, RouterSpec(top_k=2))
    token = torch.randn(1, 1, 16)
    with torch.no_grad():
        expected = router(token)
        for other in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
            torch.testing.assert_close(other(token), expected)
