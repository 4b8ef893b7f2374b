"""States in a cache that grows: room made ahead never changes what anybody else holds."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.routers.states import DynamicStates, remember

CHANNELS = 7


def state(number: float, tokens: int = 1, batch: int = 2) -> Tensor:
    return torch.full((batch, tokens, CHANNELS), float(number))


def started(tokens: int = 3, batch: int = 2) -> DynamicStates:
    states = DynamicStates()
    remember(states, torch.arange(1.0, tokens + 1)[None, :, None].expand(batch, -1, CHANNELS))
    return states


def step(states: DynamicStates, number: float) -> None:
    """One token as compiled gates take it: the row is written where it stays."""
    ahead = states.ahead()
    next_BC = states.next_row()
    assert next_BC.data_ptr() == ahead.next and next_BC.stride() == (ahead.step, 1)
    next_BC.fill_(number)
    states.advance()


def numbers(states: DynamicStates, row: int = 0) -> list[float]:
    keys: Any = states.keys
    assert bool((keys == keys[..., :1]).all())
    return keys[row, 0, :, 0].tolist()


def test_steps_append_and_move_nothing() -> None:
    states = started()
    step(states, 4)
    keys: Any = states.keys
    for number in range(5, 40):
        step(states, number)
    after: Any = states.keys
    assert after.data_ptr() == keys.data_ptr()
    assert numbers(states) == list(range(1, 40))
    for number in range(40, 200):
        step(states, number)
    assert numbers(states) == list(range(1, 200))
    assert states.get_seq_length() == 199


def test_a_crop_goes_on_and_what_was_seen_before_stays() -> None:
    states = started()
    for number in (4, 5, 6):
        step(states, number)
    before: Any = states.keys
    held = before.clone()
    states.crop(-2)
    step(states, 50)
    step(states, 60)
    assert numbers(states) == [1, 2, 3, 4, 50, 60]
    assert torch.equal(before, held)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_go_their_own_ways(copied: Any) -> None:
    one = started()
    step(one, 4)
    other = copied(one)
    step(one, 5)
    step(other, 6)
    step(one, 7)
    step(other, 8)
    assert numbers(one) == [1, 2, 3, 4, 5, 7]
    assert numbers(other) == [1, 2, 3, 4, 6, 8]


def test_beams_are_reordered_repeated_and_selected() -> None:
    states = started(batch=1)
    step(states, 4)
    states.batch_repeat_interleave(2)
    states.ahead()
    states.next_row().copy_(torch.tensor([[5.0], [6.0]]))
    states.advance()
    turned: Any = torch.tensor([1, 0])
    states.reorder_cache(turned)
    step(states, 9)
    assert numbers(states, 0) == [1, 2, 3, 4, 6, 9] and numbers(states, 1) == [1, 2, 3, 4, 5, 9]
    states.batch_select_indices(torch.tensor([1]))
    step(states, 10)
    assert numbers(states) == [1, 2, 3, 4, 5, 9, 10]


def test_several_tokens_and_other_rows_are_joined() -> None:
    states = started()
    step(states, 4)
    remember(states, state(5, tokens=2))
    remember(states, state(6))
    step(states, 7)
    assert numbers(states) == [1, 2, 3, 4, 5, 5, 6, 7]


def test_inference_mode_may_begin_and_end() -> None:
    with torch.inference_mode():
        states = started()
        step(states, 4)
    step(states, 5)
    with torch.inference_mode():
        step(states, 6)
    step(states, 7)
    assert numbers(states) == [1, 2, 3, 4, 5, 6, 7]


def test_a_step_that_fails_leaves_nothing() -> None:
    states = started()
    step(states, 4)
    states.ahead()
    states.next_row().fill_(99)
    assert numbers(states) == [1, 2, 3, 4]
    step(states, 5)
    assert numbers(states) == [1, 2, 3, 4, 5]
