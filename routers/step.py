"""One token after others: what routers remember, brought up to date in few operations.

B batch, S sequence, H horizons, E experts, F parts of a feature (the token and its means), C
channels of all routers' states.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moiety.routers import native
from moiety.routers.states import States, remember


class Counts(NamedTuple):
    """Tokens that each horizon holds, the share of a mean that is its last token, what follows."""

    count_BH: Tensor
    share_B1H: Tensor
    next_B1: Tensor


class Step:
    """All routers' memory at one new token of each sequence.

    The state after the token before is a row of means, how many tokens each horizon holds, and
    the position that comes next (0 before the first). A mean m over n tokens becomes one over
    n' = r n + 1, r the horizon's rate: m + (value - m) / n'. A token of another position than the
    next one starts a document, where n is 0; where the last column of `mask_BS` is 0 it is padding
    and changes nothing. Compiled gates do all that themselves, on the rows of `memory`.
    """

    def __init__(
        self,
        states: States,
        channels: int,
        rate_H: Tensor,
        position_B1: Tensor | None,
        mask_BS: Tensor | None,
    ) -> None:
        self._states, self._channels, self._rate_H = states, channels, rate_H
        self._position_B1, self._mask_BS = position_B1, mask_BS
        self._past_BC: Tensor | None = None
        self._counts: Counts | None = None
        self._memory: native.Memory | None = None
        self._found: dict[int, Tensor] = {}

    def memory(self) -> native.Memory | None:
        """Where compiled gates read and write; None unless that is on the CPU."""
        if self._memory is None and self._rate_H.is_cpu:
            position_B1, mask_BS = self._position_B1, self._mask_BS
            if position_B1 is not None:
                position_B1 = self._position_B1 = position_B1.to("cpu", torch.int64)
            if mask_BS is not None and (mask_BS.is_floating_point() or not mask_BS.is_cpu):
                mask_BS = self._mask_BS = mask_BS.to("cpu", torch.bool)
            given = self._rate_H, self._channels, position_B1, mask_BS
            self._memory = native.memory_of(self._states.ahead(), *given)
        return self._memory

    def _past(self) -> Tensor:
        if self._past_BC is None:
            self._past_BC = self._states.last()
        assert self._past_BC is not None
        return self._past_BC

    def counts(self) -> Counts:
        """What this token makes of the counts and the position."""
        if self._counts is None:
            self._counts = self._counted()
        return self._counts

    def _counted(self) -> Counts:
        width, past_BC = len(self._rate_H), self._past()
        past_BH, past_B1 = past_BC[:, -1 - width : -1], past_BC[:, -1:]
        count_BH, next_B1 = past_BH, past_B1
        if self._position_B1 is not None:
            position_B1 = self._position_B1.to(past_B1)
            count_BH = past_BH.masked_fill(position_B1 != past_B1, 0.0)
            next_B1 = position_B1 + 1
        count_BH = count_BH * self._rate_H + 1
        share_BH = count_BH.reciprocal()
        if self._mask_BS is not None:
            kept_B1 = self._mask_BS[:, -1:].to(past_B1) > 0
            share_BH = torch.where(kept_B1, share_BH, 0.0)
            count_BH = torch.where(kept_B1, count_BH, past_BH)
            next_B1 = torch.where(kept_B1, next_B1, past_B1)
        return Counts(count_BH, share_BH[:, None], next_B1)

    def logits(self, each_BEF: Tensor, start: int) -> Tensor:
        """The token's own part and its means at every horizon, summed (B, E)."""
        return each_BEF[..., 0] + self.means(each_BEF[..., 1:], start).sum(-1)

    def means(self, value_BEH: Tensor, start: int) -> Tensor:
        """A router's means at every horizon, this token included (B, E, H)."""
        device, shape = value_BEH.device, value_BEH.shape
        past_BEH = self._past()[:, start : start + shape[1] * shape[2]].view(shape)
        share_B1H = self.counts().share_B1H
        found_BEH = torch.lerp(past_BEH, value_BEH.to(past_BEH.device), share_B1H)
        self._found[start] = found_BEH
        return found_BEH.to(device)

    def end(self) -> None:
        """Keep the state after this token."""
        found = {start: found_BEH.flatten(1) for start, found_BEH in self._found.items()}
        if self._memory is None:
            counts = self.counts()
            means = [found[start] for start in sorted(found)]
            state_BC = torch.cat([*means, counts.count_BH, counts.next_B1], 1)
            remember(self._states, state_BC[:, None])
            return
        for start, found_BC in found.items():
            self._states.next_row()[:, start : start + found_BC.shape[1]] = found_BC.detach()
        self._states.advance()
