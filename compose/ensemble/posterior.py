"""The posterior over experts as pure functions on one call's logits.

B batch, S tokens of the call, K of them with logits asked for, E experts, V vocabulary.
Row 0 stands for the last position before the call, row s for the call's own position s - 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 256
"""Positions whose logits are widened to fp32 at once."""


@dataclass(frozen=True)
class Links:
    """Which row predicted each token that is fed, for padding anywhere.

    `latest_BS` is the row of the last real token up to each position, `predictor_BS` that before
    it. `known_BS`: a real token was seen up to there; `counted_BS`: the token is real and
    something predicted it, so it is evidence.
    """

    latest_BS: Tensor
    predictor_BS: Tensor
    known_BS: Tensor
    counted_BS: Tensor


def link(real_BS: Tensor, before_B: Tensor) -> Links:
    """Links of a call; `before_B`: whether a real token was fed before it."""
    rows_S = torch.arange(1, real_BS.shape[1] + 1, device=real_BS.device)
    latest_BS = (rows_S * real_BS).cummax(1).values
    predictor_BS = pad(latest_BS[:, :-1], (1, 0))
    before_B1 = before_B[:, None]
    counted_BS = real_BS & (before_B1 | (predictor_BS > 0))
    return Links(latest_BS, predictor_BS, before_B1 | (latest_BS > 0), counted_BS)


def fed_log_probs(
    logits_BSV: Tensor, before_BV: Tensor | None, ids_BS: Tensor, links: Links
) -> Tensor:
    """Log-probability that an expert gave each token fed (B, S) in fp32; 0 where none is counted.

    `before_BV` are its log-probabilities in row 0, None if there is no such row.
    """
    place_BS = (links.predictor_BS - 1).clamp(min=0)
    batch_B1 = torch.arange(len(ids_BS), device=ids_BS.device)[:, None]
    chosen_BS = logits_BSV[batch_B1, place_BS, ids_BS].float()
    parts = [part.float().logsumexp(-1) for part in logits_BSV.split(CHUNK, dim=1)]
    fed_BS = chosen_BS - torch.cat(parts, 1).gather(1, place_BS)
    if before_BV is not None:
        fed_BS = torch.where(links.predictor_BS > 0, fed_BS, before_BV.gather(1, ids_BS))
    return fed_BS.masked_fill(~links.counted_BS, 0.0)


def latest_log_probs(
    logits_BSV: Tensor, before_BV: Tensor | None, links: Links, rows: int
) -> Tensor:
    """Log-probabilities after the last real token up to each of the last `rows` positions.

    (B, rows, V) in fp32; without meaning where no real token was seen.
    """
    latest_BR = links.latest_BS[:, -rows:]
    place_BR = (latest_BR - 1).clamp(min=0)
    batch_B1 = torch.arange(len(latest_BR), device=latest_BR.device)[:, None]
    found_BRV = logits_BSV[batch_B1, place_BR].float().log_softmax(-1)
    if before_BV is None:
        return found_BRV
    return torch.where((latest_BR > 0)[..., None], found_BRV, before_BV[:, None])


def mix(
    mixed_BKV: Tensor, total_BK: Tensor, log_probs_BKV: Tensor, evidence_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """Add one expert to a mixture: the new log-mixture and the log of all weights so far.

    Only ratios of weights meet the log-probabilities, so that a long sequence's evidence costs
    no precision; an expert of weight 0 (-inf) leaves the others bit for bit.
    """
    new_total_BK = torch.logaddexp(total_BK, evidence_BK)
    old_BK1, own_BK1 = (_share(part, new_total_BK) for part in (total_BK, evidence_BK))
    return torch.logaddexp(mixed_BKV + old_BK1, log_probs_BKV + own_BK1), new_total_BK


def _share(part_BK: Tensor, whole_BK: Tensor) -> Tensor:
    share_BK = torch.where(part_BK.isneginf(), part_BK, part_BK - whole_BK)
    return share_BK.float()[..., None]
