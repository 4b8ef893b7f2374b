"""What gate training minimises, over a batch that may be spread over processes.

W windows, C context length, T tokens (W x C flattened), E experts, A active experts.
"""

from collections.abc import Sequence
from typing import cast

from accelerate import Accelerator
from torch import Tensor, nn

from moiety.routers.gates import Gate, Route, watched
from moiety.routers.losses import balance_loss, domain_loss, expert_counts, load_shares, z_loss
from moiety.routers.passes import input_device, next_token_loss, predicted_tokens
from moiety.routers.settings import TrainSettings


def batch_loss(
    model: nn.Module,
    gates: Sequence[Gate],
    batch: dict[str, Tensor],
    settings: TrainSettings,
    accelerator: Accelerator,
) -> Tensor:
    """This process's share of the loss of the global batch, in nats a token.

    Sums are divided by the token counts of *all* processes, and the load in the balance loss is
    that of all processes, so shares and their gradients add up to those of one process holding
    the whole batch, even where the processes hold different numbers of tokens. `batch` holds
    `ids_WC`, `mask_WC` and the own expert of each window, `own_W`.
    """
    device = input_device(model)
    ids_WC, mask_WC = batch["ids_WC"].to(device), batch["mask_WC"].to(device)
    own_T = batch["own_W"].repeat_interleave(ids_WC.shape[1])
    routes: list[Route] = []
    with watched(gates, routes.append):
        language = next_token_loss(model, ids_WC, mask_WC)
    predicted = _sum(predicted_tokens(mask_WC), accelerator)
    tokens = _sum(mask_WC.sum(), accelerator)
    loss = language.to(device) / predicted
    for route in routes:
        gate_loss = _gate_loss(route, own_T, mask_WC.flatten(), tokens, settings, accelerator)
        loss = loss + gate_loss.to(device) / len(routes)
    return loss


def _gate_loss(
    route: Route,
    own_T: Tensor,
    mask_T: Tensor,
    tokens: Tensor,
    settings: TrainSettings,
    accelerator: Accelerator,
) -> Tensor:
    logits_TE = route.logits_TE
    mask_T, own_T, tokens = (one.to(logits_TE.device) for one in (mask_T.bool(), own_T, tokens))
    counts_E = expert_counts(route.experts_TA, mask_T, logits_TE.shape[1])
    load_E = load_shares(_sum(counts_E, accelerator))
    return (
        settings.domain_weight * domain_loss(logits_TE, own_T, mask_T, tokens)
        + settings.balance_weight * balance_loss(logits_TE, mask_T, load_E, tokens)
        + settings.z_weight * z_loss(logits_TE, mask_T, tokens)
    )


def _sum(value: Tensor, accelerator: Accelerator) -> Tensor:
    return cast(Tensor, accelerator.reduce(value, "sum"))
