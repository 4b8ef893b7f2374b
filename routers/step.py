"""One token after others: what routers remember, brought up to date in few operations.

B batch, H horizons, E experts, F parts of a feature (the token and its means), C channels of all
routers' states.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

SMALLEST = 1e-6


class Step:
    """All routers' memory at one new token of each sequence.

    `past_BC` is the state after the token before: sums, counts of each horizon, and its position
    plus 1 (0 if there is none). A token whose `position_B1` does not follow starts a document;
    one with `kept_B1` 0 is padding.
    """

    def __init__(
        self,
        past_BC: Tensor,
        channels: int,
        rate_H: Tensor,
        position_B1: Tensor | None,
        kept_B1: Tensor | None,
    ) -> None:
        width = len(rate_H)
        decay_BH, self.last_B1 = rate_H, past_BC[:, -1:]
        if position_B1 is not None:
            last_B1, position_B1 = self.last_B1, position_B1.to(past_BC)
            decay_BH = rate_H * ((position_B1 == last_B1) | (last_B1 == 0))
            self.last_B1 = position_B1 + 1
        if kept_B1 is not None:
            kept_B1 = kept_B1.to(past_BC)
            decay_BH = torch.where(kept_B1 > 0, decay_BH, 1.0)
            self.last_B1 = torch.where(kept_B1 > 0, self.last_B1, past_BC[:, -1:])
        count_BH = past_BC[:, -1 - width : -1] * decay_BH
        self.count_BH = count_BH + (1.0 if kept_B1 is None else kept_B1)
        per_BH1 = (1 / self.count_BH.clamp(min=SMALLEST))[..., None]
        past_BCH = past_BC[:, :channels].view(len(past_BC), -1, width)
        self.past_BCH = past_BCH * decay_BH.expand(len(past_BC), width)[:, None]
        self._carried_BC1 = self.past_BCH @ per_BH1
        self._kept_B1 = kept_B1
        new_BH1 = per_BH1 if kept_B1 is None else per_BH1 * kept_B1[..., None]
        self._share_BF1 = pad(new_BH1, (0, 0, 1, 0), value=1.0)
        self._seen: dict[int, Tensor] = {}

    def logits(self, each_BEF: Tensor, start: int) -> Tensor:
        """The token's own part and its means at every horizon, summed (B, 1, E)."""
        device, each_BEF = each_BEF.device, each_BEF.to(self._share_BF1.device)
        self._seen[start] = each_BEF
        first = start // self.past_BCH.shape[-1]
        carried_BE1 = self._carried_BC1[:, first : first + each_BEF.shape[1]]
        return torch.baddbmm(carried_BE1, each_BEF, self._share_BF1).transpose(1, 2).to(device)

    def sums(self, value_BE: Tensor, start: int) -> Tensor:
        """The sum at a single horizon, this token included (B, E)."""
        device, value_BE = value_BE.device, value_BE.to(self._share_BF1.device)
        self._seen[start] = pad(value_BE[..., None], (1, 0))
        if self._kept_B1 is not None:
            value_BE = value_BE * self._kept_B1
        return (self.past_BCH[:, start : start + value_BE.shape[1], 0] + value_BE).to(device)

    def state(self) -> Tensor:
        """The state after this token (B, 1, C + H + 1)."""
        seen_BCF = torch.cat([self._seen[start] for start in sorted(self._seen)], 1)
        new_BCH = seen_BCF[..., 1:]
        if self._kept_B1 is not None:
            new_BCH = new_BCH * self._kept_B1[..., None]
        sums_BC = (self.past_BCH + new_BCH).flatten(1)
        return torch.cat([sums_BC, self.count_BH, self.last_B1], 1)[:, None]
