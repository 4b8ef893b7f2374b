"""One token after others: what routers remember, brought up to date in few operations.

B batch, H horizons, E experts, F parts of a feature (the token and its means), C channels of all
routers' states.
"""

import torch
from torch import Tensor


class Step:
    """All routers' memory at one new token of each sequence.

    `past_BC` is the state after the token before: means, how many tokens each horizon holds, and
    the position that comes next (0 before the first). A mean m over n tokens becomes one over
    n' = r n + 1, r the horizon's rate: m + (value - m) / n'. A token of another position than the
    next one starts a document, where n is 0; one with `kept_B1` 0 is padding and changes nothing.
    """

    def __init__(
        self,
        past_BC: Tensor,
        channels: int,
        rate_H: Tensor,
        position_B1: Tensor | None,
        kept_B1: Tensor | None,
    ) -> None:
        past_BH, past_B1 = past_BC[:, channels:-1], past_BC[:, -1:]
        self._past_BCH = past_BC[:, :channels].view(len(past_BC), -1, len(rate_H))
        self.count_BH, self.next_B1 = past_BH, past_B1
        if position_B1 is not None:
            position_B1 = position_B1.to(past_BC)
            self.count_BH = past_BH.masked_fill(position_B1 != past_B1, 0.0)
            self.next_B1 = position_B1 + 1
        self.count_BH = self.count_BH * rate_H + 1
        share_BH = self.count_BH.reciprocal()
        if kept_B1 is not None:
            kept_B1 = kept_B1.to(past_BC) > 0
            share_BH = torch.where(kept_B1, share_BH, 0.0)
            self.count_BH = torch.where(kept_B1, self.count_BH, past_BH)
            self.next_B1 = torch.where(kept_B1, self.next_B1, past_B1)
        self._share_B1H = share_BH[:, None]
        self._found: dict[int, Tensor] = {}

    def logits(self, each_BEF: Tensor, start: int) -> Tensor:
        """The token's own part and its means at every horizon, summed (B, E)."""
        return each_BEF[..., 0] + self.means(each_BEF[..., 1:], start).sum(-1)

    def means(self, value_BEH: Tensor, start: int) -> Tensor:
        """A router's means at every horizon, this token included (B, E, H)."""
        device, share_B1H = value_BEH.device, self._share_B1H
        first = start // share_B1H.shape[-1]
        past_BEH = self._past_BCH[:, first : first + value_BEH.shape[1]]
        found_BEH = torch.lerp(past_BEH, value_BEH.to(past_BEH.device), share_B1H)
        self._found[start] = found_BEH
        return found_BEH.to(device)

    def state(self) -> Tensor:
        """The state after this token (B, 1, C + H + 1)."""
        found = [self._found[start].flatten(1) for start in sorted(self._found)]
        return torch.cat([*found, self.count_BH, self.next_B1], 1)[:, None]
