"""The closed forms by themselves: what each minimises, finds and leaves alone."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moiety.errors import InputError
from moiety.routers import (
    GateStatistics,
    initialise,
)


def _statistics(hidden_TD: torch.Tensor, label_T: torch.Tensor, experts: int) -> GateStatistics:
    count_E = label_T.bincount(minlength=experts)
    weight_T = 1 / count_E[label_T]
    target_TE = torch.nn.functional.one_hot(label_T, experts).float()
    return GateStatistics(
        name="gate",
        layer=0,
        gram_WW=(hidden_TD * weight_T[:, None]).T @ hidden_TD,
        sum_EW=(target_TE * weight_T[:, None]).T @ hidden_TD,
        count_E=count_E,
        sample_NW=hidden_TD,
        label_N=label_T,
    )


def _planted(seed: int, tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label_T = torch.cat([torch.arange(3), torch.randint(0, 3, (tokens,), generator=generator)])
    hidden_TD = torch.randn(len(label_T), 7, generator=generator) * 0.1
    hidden_TD[torch.arange(len(label_T)), label_T] += 1
    return hidden_TD, label_T


def _centred(weight_ED: torch.Tensor) -> torch.Tensor:
    return weight_ED - weight_ED.mean(0)


@given(st.integers(0, 50))
def test_ridge_is_weighted_least_squares(seed: int) -> None:
    hidden_TD, label_T = _planted(seed)
    statistics, penalty = _statistics(hidden_TD, label_T, 3), 0.1
    root_T1 = (1 / label_T.bincount()[label_T]).sqrt()[:, None]
    ridge = math.sqrt(penalty * float(statistics.gram_WW.diagonal().mean()))
    rows = torch.cat([hidden_TD * root_T1, ridge * torch.eye(7)])
    targets = torch.cat([torch.nn.functional.one_hot(label_T, 3) * root_T1, torch.zeros(7, 3)])
    expected_DE = torch.linalg.lstsq(rows, targets).solution
    weight_ED = initialise.ridge(statistics, penalty)
    torch.testing.assert_close(weight_ED, _centred(expected_DE.T), atol=1e-4, rtol=1e-3)


@given(st.permutations(range(3)))
def test_permuting_experts_permutes_rows(order: list[int]) -> None:
    hidden_TD, label_T = _planted(0)
    renamed_T = torch.tensor(order)[label_T]
    for solve in (initialise.ridge, initialise.centroid):
        plain_ED = solve(_statistics(hidden_TD, label_T, 3))
        renamed_ED = solve(_statistics(hidden_TD, renamed_T, 3))
        torch.testing.assert_close(renamed_ED[order], plain_ED, atol=1e-5, rtol=1e-4)


def test_labels_weigh_the_same_however_many_tokens_they_have() -> None:
    hidden_TD, label_T = _planted(1)
    often_TD = torch.cat([hidden_TD, hidden_TD[label_T == 1].repeat(9, 1)])
    often_T = torch.cat([label_T, label_T[label_T == 1].repeat(9)])
    for solve in (initialise.ridge, initialise.centroid):
        plain_ED, often_ED = (
            solve(_statistics(*pair, 3)) for pair in ((hidden_TD, label_T), (often_TD, often_T))
        )
        torch.testing.assert_close(plain_ED, often_ED, atol=1e-5, rtol=1e-4)


def test_centroid_is_the_nearest_mean_by_cosine() -> None:
    hidden_TD, label_T = _planted(2)
    mean_ED = torch.stack([hidden_TD[label_T == label].mean(0) for label in range(3)])
    cosine_TE = torch.cosine_similarity(hidden_TD[:, None], mean_ED[None], dim=-1)
    logits_TE = hidden_TD @ initialise.centroid(_statistics(hidden_TD, label_T, 3)).T
    assert torch.equal(logits_TE.argmax(-1), cosine_TE.argmax(-1))


@pytest.mark.parametrize("seed", range(3))
def test_logistic_is_a_minimum_and_beats_ridge(seed: int) -> None:
    hidden_TD, label_T = _planted(seed)
    hidden_TD = hidden_TD + torch.randn(
        hidden_TD.shape, generator=torch.Generator().manual_seed(seed + 50)
    )
    hidden_TD[:, 0] *= 5
    statistics, penalty = _statistics(hidden_TD, label_T, 3), 1e-2
    weight_EW = initialise.logistic(statistics, penalty).requires_grad_()
    count_E = label_T.bincount()
    loss_T = torch.nn.functional.cross_entropy(hidden_TD @ weight_EW.T, label_T, reduction="none")
    share_T = 1 / (3 * count_E[label_T])
    square = float((share_T[:, None] * hidden_TD.square()).sum(0).mean())
    loss = (share_T * loss_T).sum() + penalty / 2 * square * weight_EW.square().sum()
    loss.backward()
    assert weight_EW.grad is not None
    assert float(weight_EW.grad.abs().max()) < 1e-3
    solved = (weight_EW.detach(), initialise.ridge(statistics, penalty))
    losses = [
        initialise.label_loss(logits_TE, label_T, initialise.best_scale(logits_TE, label_T))
        for logits_TE in (hidden_TD @ one_EW.T for one_EW in solved)
    ]
    assert losses[0] < losses[1]


def test_logistic_needs_a_sample_of_every_label() -> None:
    hidden_TD, label_T = _planted(0)
    statistics = _statistics(hidden_TD, label_T, 3)
    part = replace(statistics, sample_NW=hidden_TD[label_T != 1], label_N=label_T[label_T != 1])
    with pytest.raises(InputError, match="none of expert 1"):
        initialise.logistic(part)


def test_prompts_are_means_at_unit_length_and_nothing_else() -> None:
    hidden_TD, label_T = _planted(2)
    mean_ED = torch.stack([hidden_TD[label_T == label].mean(0) for label in range(3)])
    weight_ED = initialise.prompts(_statistics(hidden_TD, label_T, 3))
    torch.testing.assert_close(weight_ED, mean_ED / mean_ED.norm(dim=-1, keepdim=True))


@given(st.integers(0, 30), st.sampled_from([(30, 12), (5, 12), (1, 12), (200, 12)]))
def test_arrow_is_the_top_right_singular_vector(seed: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(shape, generator=generator) for _expert in range(2)]
    deltas[1] += 4 * torch.randn(shape[0], 1, generator=generator)
    weight_ED = initialise.arrow(deltas)
    for weight_D, delta_OD in zip(weight_ED, deltas, strict=True):
        stretch = float((delta_OD @ weight_D).norm())
        assert stretch == pytest.approx(float(torch.linalg.matrix_norm(delta_OD, 2)), rel=1e-3)
        assert float(weight_D.norm()) == pytest.approx(1, abs=1e-5)
        assert float(weight_D[weight_D.abs().argmax()]) > 0


def test_arrow_is_the_same_on_every_call_and_leaves_the_random_state_alone() -> None:
    deltas = [torch.randn(40, 20).bfloat16(), torch.zeros(3, 20)]
    state = torch.get_rng_state()
    first = initialise.arrow(deltas)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    assert torch.equal(first, initialise.arrow(deltas))
    assert torch.equal(first[1], torch.zeros(20))
    with pytest.raises(InputError, match="gate's width"):
        initialise.arrow([torch.ones(3, 20), torch.ones(3, 21)])
    with pytest.raises(InputError, match="delta of expert 1"):
        initialise.arrow([torch.ones(3, 4), torch.full((3, 4), math.nan)])


def test_random_is_seeded_and_of_the_stock_size() -> None:
    weight_ED = initialise.random(8, 500, seed=1)
    assert torch.equal(weight_ED, initialise.random(8, 500, seed=1))
    assert float(weight_ED.std()) == pytest.approx(0.02, rel=0.05)


def test_best_scale_is_a_minimum_and_is_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    label_T = torch.arange(300) % 3
    logits_TE = torch.nn.functional.one_hot(label_T, 3) + torch.randn(300, 3, generator=generator)
    scale = initialise.best_scale(logits_TE, label_T)
    best = initialise.label_loss(logits_TE, label_T, scale)
    assert all(best < initialise.label_loss(logits_TE, label_T, scale * off) for off in (0.8, 1.25))
    assert initialise.best_scale(10 * logits_TE, label_T) == pytest.approx(scale / 10, rel=1e-3)
    separable_TE = torch.nn.functional.one_hot(label_T, 3).float()
    assert math.isfinite(initialise.best_scale(separable_TE, label_T))
    assert initialise.best_scale(torch.ones(300, 3), label_T) == 1.0
