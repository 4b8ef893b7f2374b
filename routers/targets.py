"""What the experts alone make of a batch: the targets of distillation and of the regret loss.

W windows, C context length, T tokens (W x C flattened), E experts, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from moiety.routers.gates import Gate, forced, one_hot, per_token
from moiety.scoring import token_losses


@torch.no_grad()
def teacher_logits(
    model: nn.Module, gates: Sequence[Gate], ids_WC: Tensor, mask_WC: Tensor, own_WC: Tensor
) -> Tensor:
    """Next-token logits (W, C, V) when every token goes to its own expert in every layer."""
    with forced(gates, per_token(own_WC)):
        return model(input_ids=ids_WC, attention_mask=mask_WC, use_cache=False).logits


@torch.no_grad()
def expert_losses(
    model: nn.Module, gates: Sequence[Gate], ids_WC: Tensor, mask_WC: Tensor
) -> Tensor:
    """Nats of the token *after* each one, were the window each expert's alone -> (T, E), fp32.

    One pass an expert, all layers and all tokens forced to it. 0 where no token follows.
    """
    losses: list[Tensor] = []
    for expert in range(gates[0].experts):
        with forced(gates, one_hot(expert)):
            logits = model(input_ids=ids_WC, attention_mask=mask_WC, use_cache=False).logits
        next_WC = token_losses(logits, ids_WC, mask_WC).roll(-1, dims=1)
        losses.append(next_WC.flatten())
    return torch.stack(losses, dim=-1)


def followed(mask_WC: Tensor) -> Tensor:
    """Which tokens have a next one to predict, as a mask (W, C) of 0 and 1."""
    return pad(mask_WC[:, 1:], (0, 1))
