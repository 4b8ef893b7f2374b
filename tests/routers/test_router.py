"""Every kind of router: what it chooses, what it is linear in, and what it refuses."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moiety.errors import InputError
from moiety.routers import Flow, Router, RouterSpec

WIDTH, EXPERTS = 16, 4


def made(flow: Flow | None = None, **fields: Any) -> Router:
    """A router with random weights."""
    torch.manual_seed(0)
    router = Router(WIDTH, EXPERTS, RouterSpec(**fields), flow)
    if router.weight is not None:
        torch.nn.init.normal_(router.weight)
    return router


def hidden(length: int = 24, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))


def scaled(hidden_BSD: Tensor) -> Tensor:
    return hidden_BSD / hidden_BSD.square().mean(-1, keepdim=True).sqrt()


KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"top_k": 2},
    "soft": {"top_k": 4},
    "sigmoid": {"kind": "sigmoid", "top_k": 2},
    "context": {"top_k": 2, "context": (4, "mean")},
    "sequence": {"kind": "sequence", "top_k": 2},
    "constant": {"kind": "constant", "weights": (0.4, 0.1, 0.3, -0.2)},
    "uniform": {"kind": "uniform"},
    "hash": {"kind": "hash"},
    "random": {"kind": "random", "seed": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_weights(kind: str) -> None:
    flow = Flow()
    router = made(flow if kind not in ("context", "sequence") else None, **KINDS[kind])
    flow.begin(torch.arange(48).view(2, 24), None)
    logits_TE, weights_TA, experts_TA = router(hidden())
    assert logits_TE.shape == (48, EXPERTS)
    assert weights_TA.shape == experts_TA.shape == (48, router.top_k)
    assert experts_TA.dtype == torch.int64
    assert 0 <= int(experts_TA.min()) <= int(experts_TA.max()) < EXPERTS
    total = 0.6 if kind == "constant" else 1.0
    torch.testing.assert_close(weights_TA.sum(-1), torch.full((48,), total))
    assert all(len(set(row)) == len(row) for row in experts_TA.tolist())


@pytest.mark.parametrize("context", [(), (4,), (4, 16, "mean")])
@pytest.mark.parametrize("score", ["linear", "absolute"])
def test_logits_are_linear_in_features(context: Any, score: Any) -> None:
    router = made(context=context, score=score)
    features_TW = router.features(hidden())
    assert features_TW.shape == (48, WIDTH * (1 + len(context)))
    assert router.weight is not None
    expected = features_TW @ router.weight.T
    logits_TE, _, _ = router(hidden())
    torch.testing.assert_close(logits_TE, expected.abs() if score == "absolute" else expected)


def test_features_are_the_token_and_its_causal_means() -> None:
    router = made(context=("mean",))
    x_BSD = hidden()
    one_BSD = scaled(x_BSD)
    mean_BSD = one_BSD.cumsum(1) / torch.arange(1, 25)[:, None]
    expected = torch.cat([one_BSD, mean_BSD], -1).view(48, -1)
    torch.testing.assert_close(router.features(x_BSD), expected, rtol=1e-5, atol=1e-5)


def test_a_posterior_gathers_evidence() -> None:
    router = made(kind="sequence")
    assert router.weight is not None
    evidence = (scaled(hidden()) @ router.weight.T).log_softmax(-1).cumsum(1)
    logits_TE, _, experts_TA = router(hidden())
    torch.testing.assert_close(logits_TE.view(2, 24, -1).exp(), evidence.softmax(-1))
    assert torch.equal(experts_TA.view(2, 24), evidence.argmax(-1))


def test_a_share_of_probability_limits_the_experts() -> None:
    router = made(top_k=4, mass=0.7)
    logits_TE, weights_TA, experts_TA = router(hidden())
    shares = logits_TE.softmax(-1).gather(1, experts_TA)
    used = weights_TA > 0
    assert bool(((shares * used).sum(-1) >= 0.7 - 1e-6).all())
    smallest = torch.where(used, shares, 2.0).min(-1).values
    assert bool(((shares * used).sum(-1) - smallest < 0.7).all())
    assert 1 < used.sum(-1).float().mean() < 4


def test_a_selection_bias_chooses_but_does_not_weigh() -> None:
    router = made(kind="sigmoid", top_k=2)
    logits_TE, _, plain = router(hidden())
    router.get_buffer("selection_bias").copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    _, weights_TA, experts_TA = router(hidden())
    assert bool((experts_TA == 2).any(-1).all()) and not bool((plain == 2).any(-1).all())
    scores = logits_TE.sigmoid().gather(1, experts_TA)
    torch.testing.assert_close(weights_TA, scores / scores.sum(-1, keepdim=True))


def test_hashes_hold_to_the_token_and_chance_to_its_place() -> None:
    flow = Flow()
    ids = torch.arange(4000).view(2, 2000)
    by_id, by_chance = made(flow, kind="hash"), made(flow, kind="random", seed=1)
    other = made(flow, kind="random", seed=2)
    found = {}
    for router in (by_id, by_chance, other):
        flow.begin(ids, None)
        flow.enter(hidden(2000), None, torch.arange(2000)[None])
        found[router] = router(hidden(2000))[2][:, 0]
        share = found[router].bincount(minlength=EXPERTS) / 4000
        assert bool(((share > 0.2) & (share < 0.3)).all()), share
    flow.begin(ids.flip(1), None)
    flow.enter(hidden(2000), None, torch.arange(2000)[None])
    turned = by_id(hidden(2000))[2].view(2, 2000).flip(1).reshape(-1)
    assert torch.equal(turned, found[by_id])
    same = (found[by_chance] == found[other]).float().mean()
    assert 0.2 < same < 0.3
    flow.begin(None, None)
    with pytest.raises(InputError, match="token ids"):
        by_id(hidden())


def test_gradients_reach_every_part_of_a_context_gate() -> None:
    router = made(top_k=4, context=(4, "mean"))
    assert router.weight is not None
    logits_TE, weights_TA, _ = router(hidden())
    (weights_TA[:, 0].sum() + logits_TE.logsumexp(-1).sum()).backward()
    assert router.weight.grad is not None
    assert bool((router.weight.grad.view(EXPERTS, 3, WIDTH).abs().sum((0, 2)) > 0).all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "hash", "context": (4,)}, "context is for kinds"),
        ({"kind": "sequence", "mass": 0.5}, "mass is for kinds"),
        ({"context": (4, 4)}, "twice"),
        ({"kind": "constant"}, "weights"),
        ({"weights": (0.5, 0.5)}, "weights"),
        ({"context": (1,)}, "greater than or equal to 2"),
        ({"mass": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RouterSpec(**fields)


def test_settings_that_do_not_fit_the_experts_are_refused() -> None:
    with pytest.raises(InputError, match="top_k must be at most the number of experts, 4"):
        made(top_k=5)
    with pytest.raises(InputError, match="weights for 4 experts"):
        made(kind="constant", weights=(0.5, 0.5))
