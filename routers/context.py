"""Causal means of what a gate sees: exact in one pass, token by token, and across documents.

B batch, S sequence, H horizons, D width, Q, K tokens of a chunk. A mean over horizon h weighs a token n tokens ago by (1 - 1/h)ⁿ;
"mean" weighs all tokens of the document so far the same. Both are a running sum over a running
count, s_t = a_t s_(t-1) + v_t, which is all that has to be kept between calls.
"""

from collections.abc import Sequence

import torch
from einops import einsum
from torch import Tensor

from moiety.routers.spec import Horizon

CHUNK = 256


def rates(horizons: Sequence[Horizon], device: torch.device) -> Tensor:
    """The share of a sum that the next token keeps of it -> rate_H."""
    kept = [1.0 if horizon == "mean" else 1.0 - 1.0 / horizon for horizon in horizons]
    return torch.tensor(kept, device=device)


def decays(rate_H: Tensor, kept_BS: Tensor, starts_BS: Tensor | None) -> Tensor:
    """What is kept of the sum at each token: 1 at padding, 0 where a document starts.

    -> decay_BSH.
    """
    decay_BSH = torch.where(kept_BS[..., None], rate_H, 1.0)
    if starts_BS is None:
        return decay_BSH
    return torch.where(starts_BS[..., None], 0.0, decay_BSH)


def document_starts(position_BS: Tensor, kept_BS: Tensor, before_B: Tensor) -> Tensor:
    """Tokens whose position does not follow that of the unpadded token before -> starts_BS.

    `before_B` is the position of the last token of an earlier call; any below 0 is followed by
    any. Several documents in one sequence are told apart this way, as transformers does.
    """
    before_B1 = before_B[:, None]
    latest_BS = last_positions(position_BS, kept_BS, before_B)
    last_BS = torch.cat([before_B1, latest_BS[:, :-1]], 1) if latest_BS.shape[1] > 1 else before_B1
    return kept_BS & (last_BS >= 0) & (position_BS != last_BS + 1)


def last_positions(position_BS: Tensor, kept_BS: Tensor, before_B: Tensor) -> Tensor:
    """Position of the last unpadded token up to each token -> position_BS."""
    if position_BS.shape[1] == 1:
        return torch.where(kept_BS, position_BS, before_B[:, None])
    place_S = torch.arange(position_BS.shape[1], device=position_BS.device)
    latest_BS = torch.where(kept_BS, place_S, -1).cummax(1).values
    inside_BS = position_BS.gather(1, latest_BS.clamp(min=0))
    return torch.where(latest_BS < 0, before_B[:, None], inside_BS)


def running_sums(decay: Tensor, value: Tensor, initial: Tensor | None) -> Tensor:
    """s_t = decay_t s_(t-1) + value_t along dimension 1, in the shape of `value` (B, S, ...).

    `decay` (B, S, ...) broadcasts against it, `initial` (B, ...) is s before the first token. By
    recursive doubling (Hillis & Steele 1986), in log2 S steps that autograd can follow.
    """
    if initial is not None:
        first = torch.addcmul(value[:, :1], decay[:, :1], initial[:, None])
        value = torch.cat([first, value[:, 1:]], 1) if value.shape[1] > 1 else first
    step, length = 1, value.shape[1]
    while step < length:
        earlier = decay[:, step:] * value[:, :-step]
        value = torch.cat([value[:, :step], value[:, step:] + earlier], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    return value


Mixing = tuple[Tensor, Tensor]


def mixings(decay_BSH: Tensor) -> list[Mixing]:
    """What every token of a chunk keeps of each other one, and of the chunks before.

    A matrix (B, H, Q, K) and a factor (B, Q, H, 1) for each chunk, fp32.
    """
    found: list[Mixing] = []
    for decay_BQH in decay_BSH.split(CHUNK, 1):
        log_BHQ = decay_BQH.double().clamp(min=1e-30).log().cumsum(1).transpose(1, 2)
        between_BHQK = (log_BHQ[..., :, None] - log_BHQ[..., None, :]).float()
        before_BQH1 = log_BHQ.exp().transpose(1, 2)[..., None].float()
        found.append((between_BHQK.exp().tril(), before_BQH1))
    return found


def wide_sums(mixed: Sequence[Mixing], value_BSD: Tensor) -> Tensor:
    """`running_sums` of one wide value at several decays, given as `mixings` -> (B, S, H, D).

    Chunk by chunk as one matrix product each, which for wide values is many times faster.
    """
    sums: list[Tensor] = []
    carry_BHD = None
    chunks = value_BSD.split(CHUNK, 1)
    for (between_BHQK, before_BQH1), value_BKD in zip(mixed, chunks, strict=True):
        sums_BQHD = einsum(between_BHQK, value_BKD, "b h q k, b k d -> b q h d")
        if carry_BHD is not None:
            sums_BQHD = sums_BQHD + before_BQH1 * carry_BHD[:, None]
        carry_BHD = sums_BQHD[:, -1]
        sums.append(sums_BQHD)
    return torch.cat(sums, 1)
