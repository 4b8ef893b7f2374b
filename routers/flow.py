"""What routers have to know of the forward pass they run in: padding, documents, earlier tokens.

B batch, S sequence, D width, H horizons, E experts, C channels of all routers' states.
"""

from typing import Any, cast

import torch
from torch import Tensor

from moiety.routers import native
from moiety.routers.context import (
    Mixing,
    decays,
    document_starts,
    last_positions,
    mixings,
    rates,
    running_sums,
    wide_sums,
)
from moiety.routers.spec import Horizon
from moiety.routers.states import States, remember, states_of
from moiety.routers.step import Step

SMALLEST = 1e-6
"""What the count of a horizon that holds no token yet is taken for."""


class Flow:
    """One model's running forward pass, shared by its routers.

    The model calls `begin`, then `enter` before its first block and `end` when it is through.
    Routers ask for `sums`. Without any of these calls, the input is one sequence without history.
    """

    def __init__(self, horizons: tuple[Horizon, ...] = (), layers: int = 0) -> None:
        self.horizons = horizons
        self.layers = layers
        self.channels = 0
        self._rate_H: Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        self.ids_BS: Tensor | None = None
        self.position_BS: Tensor | None = None
        self.decay_BSH: Tensor | None = None
        self.count_BSH: Tensor | None = None
        self._mask_BS: Tensor | None = None
        self._kept_BS: Tensor | None = None
        self._mixed: list[Mixing] | None = None
        self._step: Step | None = None
        self._states: States | None = None
        self._past_BC: Tensor | None = None
        self._last_BS: Tensor | None = None
        self._found: dict[int, Tensor] = {}

    def reserve(self, channels: int) -> int:
        """Room for one router's states; gives the number of its first channel."""
        start = self.channels
        self.channels += channels
        return start

    def begin(self, ids_BS: Tensor | None, mask: Any) -> None:
        """A forward pass starts, of these token ids and with this attention mask."""
        self._forget()
        self.ids_BS = ids_BS
        self._mask_BS = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def enter(self, hidden_BSD: Tensor, cache: Any, position: Tensor | None) -> None:
        """The first block is reached, with this cache and these positions (B or 1, S)."""
        batch, length = hidden_BSD.shape[:2]
        if position is not None and position.ndim == 2:
            alike = position.shape[0] == batch
            self.position_BS = position if alike else position.expand(batch, length)
        if not self.horizons:
            return
        states = None if cache is None else states_of(cache, self.layers)
        self._states = states
        if length == 1 and states is not None and states.started():
            rate_H = self._rates(cast(Tensor, states.keys).device)
            self._step = Step(states, self.channels, rate_H, self.position_BS, self._mask_BS)
        else:
            self._past_BC = None if states is None else states.last()
            self._measure(batch, length, hidden_BSD.device)

    def _measure(self, batch: int, length: int, device: torch.device) -> None:
        """Decays and counts of this pass's tokens."""
        kept_BS = torch.ones((batch, length), dtype=torch.bool, device=device)
        if self._mask_BS is not None:
            kept_BS = self._mask_BS[:, -length:].to(device).bool()
        past_BC, starts_BS = self._past_BC, None
        if self.position_BS is not None:
            position_BS = self.position_BS.to(device).float()
            before_B = position_BS.new_full((batch,), -1.0)
            if past_BC is not None:
                before_B = past_BC[:, -1] - 1
            starts_BS = document_starts(position_BS, kept_BS, before_B)
            self._last_BS = last_positions(position_BS, kept_BS, before_B) + 1
        self._kept_BS = kept_BS
        self._mixed = None
        self.decay_BSH = decays(self._rates(device), kept_BS, starts_BS)
        ones_BSH = kept_BS[..., None].float().expand_as(self.decay_BSH)
        width = len(self.horizons)
        past_BH = None if past_BC is None else past_BC[:, -1 - width : -1]
        self.count_BSH = running_sums(self.decay_BSH, ones_BSH, past_BH)

    def _rates(self, device: torch.device) -> Tensor:
        if self._rate_H is None or self._rate_H.device != device:
            self._rate_H = rates(self.horizons, device)
        return self._rate_H

    def memory(self) -> native.Memory | None:
        """Where compiled gates find and leave what they remember, in a step of one token."""
        return None if self._step is None else self._step.memory()

    def logits(self, each_BSEF: Tensor, start: int | None) -> Tensor:
        """A gate's logits (B, S, E) from its weights times the token, one column a feature part.

        Column 0 stands for the token itself, the others for its causal means, which are taken
        here: of E numbers instead of D, since a gate is linear.
        """
        if self._step is not None and start is not None:
            return self._step.logits(each_BSEF[:, 0], start)[:, None]
        return each_BSEF[..., 0] + self.means(each_BSEF[..., 1:], start).sum(-1)

    def sums(self, value_BSEH: Tensor, start: int | None) -> Tensor:
        """Running sums of what a router saw: its means, times what they hold."""
        mean_BSEH = self.means(value_BSEH, start)
        count_BSH = self.count_BSH if self._step is None else self._step.counts().count_BH[:, None]
        assert count_BSH is not None
        return mean_BSEH * count_BSH.to(mean_BSEH.device)[:, :, None]

    def means(self, value_BSEH: Tensor, start: int | None) -> Tensor:
        """Causal means of what a router saw, padding left out; kept if it has room from `start`."""
        if self._step is not None and start is not None:
            return self._step.means(value_BSEH[:, 0], start)[:, None]
        self._check(value_BSEH)
        assert self.decay_BSH is not None and self._kept_BS is not None
        assert self.count_BSH is not None
        batch, _length, experts, width = value_BSEH.shape
        device, past_BEH = value_BSEH.device, None
        if self._past_BC is not None and start is not None:
            past_BC = self._past_BC[:, start : start + experts * width]
            past_BEH = past_BC.view(batch, experts, width) * self._past_BC[:, None, -1 - width : -1]
            past_BEH = past_BEH.to(device)
        kept_BS11 = self._kept_BS.to(device)[..., None, None]
        value_BSEH = torch.where(kept_BS11, value_BSEH, 0.0)
        sums_BSEH = running_sums(self.decay_BSH.to(device)[:, :, None], value_BSEH, past_BEH)
        mean_BSEH = sums_BSEH / self.count_BSH.to(device).clamp(min=SMALLEST)[:, :, None]
        if start is not None and self._states is not None:
            self._found[start] = mean_BSEH.flatten(2)
        return mean_BSEH

    def wide_means(self, value_BSD: Tensor) -> Tensor:
        """Causal means of the whole input at every horizon (B, S, H, D), without history."""
        self._check(value_BSD)
        assert self.decay_BSH is not None and self._kept_BS is not None
        assert self.count_BSH is not None
        device = value_BSD.device
        value_BSD = torch.where(self._kept_BS.to(device)[..., None], value_BSD, 0.0)
        if self._mixed is None:
            self._mixed = mixings(self.decay_BSH.to(device))
        mixed = [(one.to(device), other.to(device)) for one, other in self._mixed]
        sums_BSHD = wide_sums(mixed, value_BSD)
        return sums_BSHD / self.count_BSH.to(device).clamp(min=SMALLEST)[..., None]

    def _check(self, value: Tensor) -> None:
        """Outside of a model's forward pass, or with other rows, nothing is known of the rows."""
        if self.decay_BSH is None or self.decay_BSH.shape[:2] != value.shape[:2]:
            self._measure(value.shape[0], value.shape[1], value.device)

    def end(self) -> None:
        """The forward pass is through: what routers remember goes into the cache."""
        if self._step is not None:
            self._step.end()
        elif self._states is not None:
            remember(self._states, self._state())
        self._forget()

    def _state(self) -> Tensor:
        """All routers' states after each token, the counts and the positions."""
        assert self.count_BSH is not None
        device, (batch, length, _) = self.count_BSH.device, self.count_BSH.shape
        last_BS = self._last_BS
        if last_BS is None:
            last_BS = self.count_BSH.new_zeros(batch, length)
        found = [self._found[start].to(device) for start in sorted(self._found)]
        return torch.cat([*found, self.count_BSH, last_BS[..., None]], -1)
