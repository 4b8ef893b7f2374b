"""Changes of routes: one expert forced, dropped, left out, or exchanged with another.

T tokens, E experts, A active experts.
"""

import torch
from torch import Tensor

from moiety.routers import Gate, RouteChange

PROTOCOLS = {
    "forced": "every token of the document goes to one expert in every layer, with the whole "
    "weight that its gate gave out",
    "ablated": "the expert's weight is set to 0 and nothing takes its place",
    "left_out": "where the expert was chosen, its weight goes to the expert of highest logit that "
    "was not; where there is none, to the token's other experts in proportion",
    "swapped": "routes to one of the two experts go to the other with the same weight",
    "document_regret": "loss of the model's own routes less that of the best forced expert of the "
    "document, chosen after all were run",
}


def force(expert: int) -> RouteChange:
    """Send every token to one expert."""

    def change(
        _gate: Gate, _logits_TE: Tensor, weights_TA: Tensor, experts_TA: Tensor
    ) -> tuple[Tensor, Tensor]:
        return weights_TA.sum(-1, keepdim=True), torch.full_like(experts_TA[:, :1], expert)

    return change


def force_one(expert_T: Tensor) -> RouteChange:
    """Send each token to the expert that `expert_T` names, and leave it where that is below 0."""

    def change(
        _gate: Gate, _logits_TE: Tensor, weights_TA: Tensor, experts_TA: Tensor
    ) -> tuple[Tensor, Tensor]:
        own_T = expert_T.to(experts_TA.device)
        named_T = own_T >= 0
        weights_TA, experts_TA = weights_TA.clone(), experts_TA.clone()
        whole_T = weights_TA[named_T].sum(-1)
        weights_TA[named_T] = 0
        weights_TA[named_T, 0] = whole_T
        experts_TA[named_T, 0] = own_T[named_T].to(experts_TA.dtype)
        return weights_TA, experts_TA

    return change


def ablate(expert: int, layer: int | None = None) -> RouteChange:
    """Drop what an expert contributes, in one layer or in all."""

    def change(
        gate: Gate, _logits_TE: Tensor, weights_TA: Tensor, experts_TA: Tensor
    ) -> tuple[Tensor, Tensor]:
        if layer is not None and gate.layer != layer:
            return weights_TA, experts_TA
        return weights_TA.masked_fill(experts_TA == expert, 0), experts_TA

    return change


def leave_out(expert: int, layer: int | None = None) -> RouteChange:
    """Let the gate do without an expert, in one layer or in all."""

    def change(
        gate: Gate, logits_TE: Tensor, weights_TA: Tensor, experts_TA: Tensor
    ) -> tuple[Tensor, Tensor]:
        if layer is not None and gate.layer != layer:
            return weights_TA, experts_TA
        chosen_TA = experts_TA == expert
        if experts_TA.shape[1] == gate.experts:
            rest_TA = weights_TA.masked_fill(chosen_TA, 0)
            total_T1 = weights_TA.sum(-1, keepdim=True)
            left_T1 = rest_TA.sum(-1, keepdim=True)
            even_TA = (~chosen_TA).to(weights_TA.dtype) / (gate.experts - 1)
            share_TA = torch.where(left_T1 > 0, rest_TA / left_T1.clamp(min=1e-20), even_TA)
            return share_TA * total_T1, experts_TA
        taken_TE = logits_TE.float().scatter(1, experts_TA, -torch.inf)
        taken_TE[:, expert] = -torch.inf
        next_T1 = taken_TE.argmax(-1, keepdim=True).to(experts_TA.dtype)
        return weights_TA, torch.where(chosen_TA, next_T1, experts_TA)

    return change


def swap(first: int, second: int) -> RouteChange:
    """Exchange two experts in every layer."""

    def change(
        _gate: Gate, _logits_TE: Tensor, weights_TA: Tensor, experts_TA: Tensor
    ) -> tuple[Tensor, Tensor]:
        to_second = torch.where(experts_TA == first, second, experts_TA)
        return weights_TA, torch.where(experts_TA == second, first, to_second)

    return change
