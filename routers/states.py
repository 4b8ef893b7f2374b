"""What routers remember of a sequence, kept in transformers' own cache as one more layer.

B batch, S sequence, T tokens so far, C channels. A row a token makes reordering (beams), cropping
(assisted generation), repeating and selecting what they are for keys and values.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from moiety.errors import InputError


class Ahead(NamedTuple):
    """Addresses of the last state and of room for the next, and how far sequences lie apart."""

    past: int
    next: int
    step: int


class DynamicStates(DynamicLayer):
    """Router states (B, 1, T, C) of a cache that grows."""

    _room: "Room | None" = None

    def started(self) -> bool:
        """Whether it holds a token."""
        return self.is_initialized and self.keys is not None and self.keys.shape[2] > 0

    def last(self) -> Tensor | None:
        """State after the last token (B, C), None before the first."""
        return cast(Tensor, self.keys)[:, 0, -1] if self.started() else None

    def ahead(self) -> Ahead:
        """Where compiled gates find the last state, of which there must be one, and leave the next.

        The next one is there to stay once `advance` is called.
        """
        keys = cast(Tensor, self.keys)
        if self._room is None or not self._room.follows(keys):
            self._room = Room(keys)
        return self._room.ahead()

    def next_row(self) -> Tensor:
        """The room that `ahead` told of (B, C)."""
        return cast(Room, self._room).next_row()

    def advance(self) -> None:
        """Take in the state that was left in the room ahead."""
        self.keys = cast(Room, self._room).grown()

    def grow(self, state_B1SC: Tensor) -> None:
        """As `update`, of an initialised layer and without joining values that are empty."""
        self.keys = torch.cat([cast(Tensor, self.keys), state_B1SC], -2)
        self.values = self.keys[..., :0]


class Room:
    """Rows for states to come, made ahead so that a new one moves none of the old.

    Of `states` (B, 1, R, C) the first `used` rows are taken and never change again, so whoever has
    a view of them (a copy of the cache, a cropped one) keeps what it has, and gets room of its own
    when it goes on from there: only the latest view of all rows that are taken may.
    """

    def __init__(self, keys: Tensor) -> None:
        batch, _, self.used, self.channels = keys.shape
        self.size = self.used + max(64, self.used // 2)
        self.states = keys.new_empty(batch, 1, self.size, self.channels)
        self.states.narrow(2, 0, self.used).copy_(keys)
        self.view = keys
        self._inference = torch.is_inference_mode_enabled()

    def follows(self, keys: Tensor) -> bool:
        """Whether these are the rows that are taken, and there is one more."""
        here = keys is self.view and self.used < self.size
        return here and torch.is_inference_mode_enabled() == self._inference

    def ahead(self) -> Ahead:
        """The last row that is taken, and the one after it."""
        width = self.channels * self.states.itemsize
        past = self.states.data_ptr() + (self.used - 1) * width
        return Ahead(past, past + width, self.size * self.channels)

    def next_row(self) -> Tensor:
        """The first row that is not taken (B, C)."""
        return self.states.select(2, self.used).squeeze(1)

    def grown(self) -> Tensor:
        """All rows that are taken, one more than before."""
        self.used += 1
        self.view = self.states.narrow(2, 0, self.used)
        return self.view


class StaticStates(StaticLayer):
    """Router states of a cache of fixed size."""

    def started(self) -> bool:
        """Whether it has been given a token, though it may have been emptied since."""
        return self.is_initialized and self.keys is not None

    def last(self) -> Tensor | None:
        """State after the last token (B, C); zeros before the first."""
        if not self.started():
            return None
        keys = cast(Tensor, self.keys)
        place = torch.as_tensor(self.cumulative_length, device=keys.device).reshape(1)
        row_BC = keys[:, 0].index_select(1, (place - 1).clamp(min=0))[:, 0]
        return torch.where(place > 0, row_BC, 0.0)

    def ahead(self) -> Ahead:
        """Where compiled gates find the last state and leave the next."""
        self._last_BC = cast(Tensor, self.last())
        self._next_BC = torch.empty_like(self._last_BC)
        channels = self._last_BC.shape[1]
        return Ahead(self._last_BC.data_ptr(), self._next_BC.data_ptr(), channels)

    def next_row(self) -> Tensor:
        """The room that `ahead` told of (B, C)."""
        return self._next_BC

    def advance(self) -> None:
        """Take in the state that was left in the room ahead."""
        state_B11C = self._next_BC[:, None, None]
        self.update(state_B11C, state_B11C[..., :0])


States = DynamicStates | StaticStates


def states_of(cache: Any, layers: int) -> States:
    """The states layer of a cache of a model with `layers` layers, made behind them if absent.

    Raises InputError for a cache of another kind, or one that holds tokens these routers have not
    seen.
    """
    kept = getattr(cache, "layers", None)
    if not isinstance(kept, list):
        raise InputError(
            f"expected one of transformers' caches, but {type(cache).__name__} has no layers for "
            "what routers remember; use a DynamicCache or a StaticCache"
        )
    for layer in reversed(kept):
        if isinstance(layer, (DynamicStates, StaticStates)):
            return layer
    seen = cache.get_seq_length()
    if isinstance(seen, int) and seen > 0:
        raise InputError(
            f"expected a cache that this model filled, but it holds {seen} tokens that the "
            "routers have not seen"
        )
    replicated = getattr(cache, "layer_class_to_replicate", None)
    while replicated is not None and len(kept) < layers:
        kept.append(replicated())
    made = _made(kept)
    kept.append(made)
    return made


def _made(layers: list[Any]) -> States:
    longest = [one.max_cache_len for one in layers if isinstance(one, StaticLayer)]
    return StaticStates(max_cache_len=max(longest)) if longest else DynamicStates()


def remember(layer: States, state_BSC: Tensor) -> None:
    """Keep the state after each new token."""
    state_B1SC = state_BSC.detach().unsqueeze(1)
    if isinstance(layer, DynamicStates) and layer.started():
        layer.grow(state_B1SC)
    else:
        layer.update(state_B1SC, state_B1SC[..., :0])
