"""Gate losses against hand values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moiety.errors import InputError
from moiety.routers.losses import (
    balance_loss,
    distill_loss,
    domain_loss,
    expert_counts,
    load_shares,
    regret_loss,
    z_loss,
)

EVERY = torch.ones(8, dtype=torch.bool)


def _collapsed(experts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 8 tokens that choose only `experts` of 4, and the routes."""
    logits_TE = torch.full((8, 4), -50.0)
    logits_TE[:, experts] = 50.0
    return logits_TE, torch.tensor([experts]).expand(8, -1)


def test_balance_is_one_when_even_and_all_experts_when_collapsed() -> None:
    assert float(balance_loss(torch.zeros(8, 4), EVERY, torch.full((4,), 0.25))) == 1.0
    logits_TE, experts_TA = _collapsed([2])
    load_E = load_shares(expert_counts(experts_TA, EVERY, 4))
    assert float(balance_loss(logits_TE, EVERY, load_E)) == pytest.approx(4.0)


def test_layers_collapsed_on_opposite_halves_are_unbalanced() -> None:
    losses = []
    for half in ([0, 1], [2, 3]):
        logits_TE, experts_TA = _collapsed(half)
        load_E = load_shares(expert_counts(experts_TA, EVERY, 4))
        losses.append(float(balance_loss(logits_TE, EVERY, load_E)))
    assert losses == pytest.approx([2.0, 2.0])


def test_balance_takes_a_gradient_through_probabilities_only() -> None:
    logits_TE = torch.randn(8, 4, requires_grad=True)
    load_E = torch.tensor([0.7, 0.1, 0.1, 0.1], requires_grad=True)
    balance_loss(logits_TE, EVERY, load_E).backward()
    assert load_E.grad is None
    assert logits_TE.grad is not None and float(logits_TE.grad[:, 0].min()) > 0


def test_z_and_domain_by_hand() -> None:
    logits_TE = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    mask_T = torch.tensor([1, 1])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert float(z_loss(logits_TE, mask_T)) == pytest.approx(expected)
    own_T = torch.tensor([1, 0])
    expected = (math.log(2) + math.log(4 / 3)) / 2
    assert float(domain_loss(logits_TE, own_T, mask_T)) == pytest.approx(expected)


@given(st.integers(0, 100), st.integers(1, 7))
def test_padding_changes_nothing_and_gets_no_gradient(seed: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(8, 4, generator=generator)
    other_TE = torch.randn(8, 4, generator=generator)
    logits_TE[tokens:] = math.nan
    logits_TE.requires_grad_()
    mask_T, own_T = torch.arange(8) < tokens, torch.full((8,), 1)
    own_T[tokens:] = -100
    load_E = torch.tensor([0.4, 0.3, 0.2, 0.1])
    short_TE, short_T = logits_TE[:tokens].detach(), mask_T[:tokens]
    pairs = [
        (z_loss(logits_TE, mask_T), z_loss(short_TE, short_T)),
        (domain_loss(logits_TE, own_T, mask_T), domain_loss(short_TE, own_T[:tokens], short_T)),
        (balance_loss(logits_TE, mask_T, load_E), balance_loss(short_TE, short_T, load_E)),
        (
            regret_loss(logits_TE, other_TE, mask_T),
            regret_loss(short_TE, other_TE[:tokens], short_T),
        ),
        (
            distill_loss(logits_TE, other_TE, mask_T),
            distill_loss(short_TE, other_TE[:tokens], short_T),
        ),
    ]
    for padded, short in pairs:
        torch.testing.assert_close(padded, short)
        (gradient_TE,) = torch.autograd.grad(padded, logits_TE, retain_graph=True)
        assert bool((gradient_TE[tokens:] == 0).all())


@given(st.integers(0, 100), st.integers(1, 7))
def test_shares_of_two_processes_add_up(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(8, 4, generator=generator)
    other_TE = torch.randn(8, 4, generator=generator)
    own_T = torch.randint(0, 4, (8,), generator=generator)
    load_E = torch.tensor([0.4, 0.3, 0.2, 0.1])
    parts = [slice(0, cut), slice(cut, 8)]
    for loss in (
        lambda at, total: z_loss(logits_TE[at], EVERY[at], total),
        lambda at, total: domain_loss(logits_TE[at], own_T[at], EVERY[at], total),
        lambda at, total: balance_loss(logits_TE[at], EVERY[at], load_E, total),
        lambda at, total: regret_loss(logits_TE[at], other_TE[at], EVERY[at], total),
        lambda at, total: distill_loss(logits_TE[at], other_TE[at], EVERY[at], total),
    ):
        whole = loss(slice(0, 8), None)
        torch.testing.assert_close(sum(loss(at, 8) for at in parts), whole)


def test_regret_is_the_expected_loss_above_the_best_experts() -> None:
    logits_TE = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    loss_TE = torch.tensor([[5.0, 7.0], [4.0, 1.0]])
    loss = regret_loss(logits_TE, loss_TE, torch.ones(2))
    assert loss.item() == pytest.approx((0.5 * 2 + 0.75 * 3) / 2)
    loss.backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.sign().tolist() == [[-1, 1], [1, -1]]
    best_TE = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])
    assert float(regret_loss(best_TE, loss_TE, torch.ones(2))) == pytest.approx(0.0, abs=1e-6)


def test_distillation_by_hand() -> None:
    student_TV = torch.tensor([[0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    teacher_TV = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], requires_grad=True)
    loss = distill_loss(student_TV, teacher_TV, torch.ones(2))
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert loss.item() == pytest.approx(expected / 2)
    loss.backward()
    assert teacher_TV.grad is None
    assert student_TV.grad is not None and float(student_TV.grad[0, 0]) < 0


def test_counts_leave_padding_out_and_no_tokens_are_even() -> None:
    experts_TA = torch.tensor([[0, 1], [1, 2], [3, 3]])
    counts_E = expert_counts(experts_TA, torch.tensor([1, 1, 0]), 4)
    assert counts_E.tolist() == [1, 2, 1, 0]
    weights_TA = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    assert expert_counts(experts_TA, torch.ones(3), 4, weights_TA).tolist() == [1, 1, 1, 2]
    assert load_shares(counts_E).tolist() == [0.25, 0.5, 0.25, 0]
    assert load_shares(torch.zeros(4)).tolist() == [0.25] * 4


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(8, 4\) and \(3,\)"):
        z_loss(torch.zeros(8, 4), torch.ones(3))
