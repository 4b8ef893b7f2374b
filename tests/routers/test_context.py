"""Causal means: by definition, in pieces, across padding and documents, and with gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moiety.routers.context import (
    decays,
    document_starts,
    last_positions,
    mixings,
    rates,
    running_sums,
    wide_sums,
)
from moiety.routers.flow import Flow


def one_by_one(decay_BSH: Tensor, value_BSH: Tensor) -> Tensor:
    """The recurrence as it is written."""
    found = [value_BSH[:, 0]]
    for at in range(1, value_BSH.shape[1]):
        found.append(decay_BSH[:, at] * found[-1] + value_BSH[:, at])
    return torch.stack(found, 1)


@given(length=st.integers(1, 40), cut=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_running_sums_are_the_recurrence_whole_or_in_two_pieces(
    length: int, cut: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    decay = torch.rand((2, length, 3), generator=generator).double()
    decay[torch.rand((2, length, 3), generator=generator) < 0.1] = 0
    value = torch.randn((2, length, 3), generator=generator).double()
    whole = running_sums(decay, value, None)
    torch.testing.assert_close(whole, one_by_one(decay, value))
    cut = min(cut, length)
    if 0 < cut < length:
        first = running_sums(decay[:, :cut], value[:, :cut], None)
        second = running_sums(decay[:, cut:], value[:, cut:], first[:, -1])
        torch.testing.assert_close(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("length", [1, 5, 256, 300, 700])
def test_wide_sums_are_running_sums(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    decay_BSH = torch.rand((2, length, 3), generator=generator) * 0.5 + 0.5
    decay_BSH[torch.rand((2, length, 3), generator=generator) < 0.05] = 0
    value_BSD = torch.randn((2, length, 6), generator=generator)
    each = [running_sums(decay_BSH[..., h : h + 1], value_BSD, None) for h in range(3)]
    torch.testing.assert_close(
        wide_sums(mixings(decay_BSH), value_BSD), torch.stack(each, 2), rtol=1e-4, atol=1e-4
    )


def test_gradients_are_those_of_the_recurrence() -> None:
    value = torch.randn(2, 13, 3, dtype=torch.float64, requires_grad=True)
    decay = torch.rand(2, 13, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: running_sums(decay, v, v[:, 0]), (value,))


def test_means_are_weighted_by_age() -> None:
    """An exponential mean, and the plain one, of one sequence by definition."""
    flow = Flow((4, "mean"))
    value_BSEH = torch.randn(1, 9, 2, 2)
    found = flow.means(value_BSEH, None)
    for at in range(9):
        age_S = torch.arange(at, -1, -1.0)
        for horizon, keeps in enumerate((0.75, 1.0)):
            weight_S = keeps**age_S
            expected_E = (weight_S[:, None] * value_BSEH[0, : at + 1, :, horizon]).sum(0)
            expected_E = expected_E / weight_S.sum()
            torch.testing.assert_close(found[0, at, :, horizon], expected_E)


def test_padding_is_passed_over_and_documents_are_forgotten() -> None:
    position = torch.tensor([[1, 1, 0, 1, 2, 0, 1]]).float()
    kept = torch.tensor([[0, 0, 1, 1, 1, 1, 1]]).bool()
    starts = document_starts(position, kept, torch.tensor([-1.0]))
    assert starts.tolist() == [[False, False, False, False, False, True, False]]
    decay = decays(rates((2,), torch.device("cpu")), kept, starts)
    assert decay[0, :, 0].tolist() == [1, 1, 0.5, 0.5, 0.5, 0, 0.5]
    assert last_positions(position, kept, torch.tensor([-1.0])).tolist() == [
        [-1, -1, 0, 1, 2, 0, 1]
    ]


@pytest.mark.parametrize(("position", "starts"), [(7.0, False), (0.0, True), (9.0, True)])
def test_a_later_call_goes_on_or_starts_a_document(position: float, starts: bool) -> None:
    kept = torch.ones((1, 1), dtype=torch.bool)
    found = document_starts(torch.tensor([[position]]), kept, torch.tensor([6.0]))
    assert found.item() is starts
