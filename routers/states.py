"""What routers remember of a sequence, kept in transformers' own cache as one more layer.

B batch, S sequence, T tokens so far, C channels. A row a token makes reordering (beams), cropping
(assisted generation), repeating and selecting what they are for keys and values.
"""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from moiety.errors import InputError


class DynamicStates(DynamicLayer):
    """Router states (B, 1, T, C) of a cache that grows."""

    def last(self) -> Tensor | None:
        """State after the last token (B, C), None before the first."""
        if not self.is_initialized or self.keys is None or self.keys.shape[-2] == 0:
            return None
        return self.keys[:, 0, -1]

    def grow(self, state_B1SC: Tensor) -> None:
        """As `update`, of an initialised layer and without joining values that are empty."""
        self.keys = torch.cat([cast(Tensor, self.keys), state_B1SC], -2)
        self.values = self.keys[..., :0]


class StaticStates(StaticLayer):
    """Router states of a cache of fixed size."""

    def last(self) -> Tensor | None:
        """State after the last token (B, C); zeros before the first."""
        if not self.is_initialized or self.keys is None:
            return None
        place = torch.as_tensor(self.cumulative_length, device=self.keys.device).reshape(1)
        row_BC = self.keys[:, 0].index_select(1, (place - 1).clamp(min=0))[:, 0]
        return torch.where(place > 0, row_BC, 0.0)


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
    state_B1SC = state_BSC.detach()[:, None]
    if isinstance(layer, DynamicStates) and layer.last() is not None:
        layer.grow(state_B1SC)
    else:
        layer.update(state_B1SC, state_B1SC[..., :0])
