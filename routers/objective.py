"""What gate training minimises, over a batch that may be spread over processes.

W windows, C context length, T tokens (W x C flattened), E experts, A active experts, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from moiety.errors import InputError
from moiety.routers.gates import Gate, Route, watched
from moiety.routers.losses import (
    balance_loss,
    distill_loss,
    domain_loss,
    expert_counts,
    load_shares,
    regret_loss,
    z_loss,
)
from moiety.routers.passes import input_device, predicted_tokens
from moiety.routers.settings import TrainSettings
from moiety.routers.targets import expert_losses, followed, teacher_logits
from moiety.routers.together import is_sharded
from moiety.scoring import token_losses


@dataclass(frozen=True)
class BatchLoss:
    """This process's share of a batch's loss, and what it consists of.

    `parts` are unweighted shares without gradient, in nats a token, the next-token loss
    `language` always among them; `counts` gives for each gate how many tokens of *all* processes
    chose each expert.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    counts: list[Tensor]


def check_objective(gates: Sequence[Gate], settings: TrainSettings) -> None:
    """Raise InputError for a loss without gradient, or a balance that the gates cannot have."""
    if settings.objective == "regret" and len({gate.experts for gate in gates}) > 1:
        raise InputError(
            "expected gates over the same experts for objective 'regret', but they have "
            f"{sorted({gate.experts for gate in gates})}; choose another objective"
        )
    supervised = settings.objective in ("domain", "regret") or settings.domain_weight > 0
    for gate in gates:
        renormalised = getattr(gate.module, "norm_topk_prob", True)
        if gate.active == 1 and renormalised and not supervised:
            raise InputError(
                f"domain_weight must be positive, but it is 0 and {gate.name} chooses one expert: "
                f"its renormalised weight is always 1, so objective {settings.objective!r} gives "
                "the gate no gradient; raise domain_weight, choose objective 'regret' or 'domain', "
                "or let each token take two experts"
            )
        if settings.balance == "bias" and not hasattr(gate.module, "selection_bias"):
            raise InputError(
                f"expected gates with a selection bias for balance 'bias', but {gate.name} has "
                "none; choose balance 'loss', or build with routers of kind 'sigmoid'"
            )


def batch_loss(
    model: nn.Module,
    gates: Sequence[Gate],
    batch: Mapping[str, Tensor],
    settings: TrainSettings,
    accelerator: Accelerator,
) -> BatchLoss:
    """The loss of the global batch, in nats a token, as this process's share of it.

    Sums are divided by the token counts of *all* processes, and the load in the balance loss is
    that of all processes, so shares and their gradients add up to those of one process holding
    the whole batch, even where the processes hold different numbers of tokens. `batch` holds
    `ids_WC`, `mask_WC` and the own expert of each token, `own_WC`.
    """
    here = _Batch.on(input_device(model), batch, accelerator)
    targets = _targets(model, gates, here, settings)
    routes: list[Route] = []
    with watched(gates, routes.append):
        logits_WCV = _logits(model, here)
    language = token_losses(logits_WCV, here.ids_WC, here.mask_WC).sum().to(here.device)
    parts = {"language": language / here.predicted}
    if settings.objective == "distill":
        parts["distill"] = distill_loss(
            logits_WCV.flatten(0, 1),
            targets.flatten(0, 1),
            here.next_T.to(logits_WCV.device),
            here.predicted.to(logits_WCV.device),
        ).to(here.device)
    weights = settings.loss_weights()
    counts = [_counts(route, here, gates, accelerator) for route in routes]
    for route, count_E in zip(routes, counts, strict=True):
        gate = gates[route.layer]
        for name, part in _gate_parts(gate, route, count_E, here, targets, weights).items():
            parts[name] = parts.get(name, 0) + part.to(here.device) / len(routes)
    loss = torch.stack([weight * parts[name] for name, weight in weights.items()]).sum()
    if is_sharded(model):
        # A block's weights are gathered for the backward pass when it reaches the block's output,
        # which the losses of the block's own gate do not come by.
        loss = loss + 0.0 * parts["language"]
    return BatchLoss(loss, {name: part.detach() for name, part in parts.items()}, counts)


@dataclass(frozen=True)
class _Batch:
    """One process's windows, and the token counts of all processes'."""

    ids_WC: Tensor
    mask_WC: Tensor
    own_WC: Tensor
    tokens: Tensor
    predicted: Tensor

    @classmethod
    def on(
        cls, device: torch.device, batch: Mapping[str, Tensor], accelerator: Accelerator
    ) -> "_Batch":
        ids_WC, mask_WC, own_WC = (
            batch[name].to(device) for name in ("ids_WC", "mask_WC", "own_WC")
        )
        tokens = _sum(mask_WC.sum(), accelerator)
        return cls(ids_WC, mask_WC, own_WC, tokens, _sum(predicted_tokens(mask_WC), accelerator))

    @property
    def device(self) -> torch.device:
        return self.ids_WC.device

    @property
    def next_T(self) -> Tensor:
        return followed(self.mask_WC).flatten()


def _logits(model: nn.Module, here: _Batch) -> Tensor:
    return model(input_ids=here.ids_WC, attention_mask=here.mask_WC, use_cache=False).logits


def _targets(
    model: nn.Module, gates: Sequence[Gate], here: _Batch, settings: TrainSettings
) -> Tensor:
    """Teacher logits (W, C, V), expert losses (T, E), or nothing, as the objective needs."""
    if settings.objective == "distill":
        return teacher_logits(model, gates, here.ids_WC, here.mask_WC, here.own_WC)
    if settings.objective == "regret":
        return expert_losses(model, gates, here.ids_WC, here.mask_WC)
    return here.ids_WC.new_empty(0)


def _counts(route: Route, here: _Batch, gates: Sequence[Gate], accelerator: Accelerator) -> Tensor:
    mask_T = here.mask_WC.flatten().to(route.experts_TA.device)
    experts = gates[route.layer].experts
    return _sum(expert_counts(route.experts_TA, mask_T, experts, route.weights_TA), accelerator)


def _gate_parts(
    gate: Gate,
    route: Route,
    count_E: Tensor,
    here: _Batch,
    targets: Tensor,
    weights: Mapping[str, float],
) -> dict[str, Tensor]:
    logits_TE = route.logits_TE
    device = logits_TE.device
    mask_T, tokens = here.mask_WC.flatten().to(device), here.tokens.to(device)
    shares_TE = _softmax_logits(gate, logits_TE)
    parts: dict[str, Tensor] = {}
    if "domain" in weights:
        own_T = here.own_WC.flatten().to(device)
        parts["domain"] = domain_loss(shares_TE, own_T, mask_T, tokens)
    if "regret" in weights:
        parts["regret"] = regret_loss(
            shares_TE, targets.to(device), here.next_T.to(device), here.predicted.to(device)
        )
    if "balance" in weights:
        parts["balance"] = balance_loss(shares_TE, mask_T, load_shares(count_E), tokens)
    if "z" in weights:
        parts["z"] = z_loss(logits_TE, mask_T, tokens)
    return parts


def _softmax_logits(gate: Gate, logits_TE: Tensor) -> Tensor:
    """Logits whose softmax is the gate's own shares, which for sigmoids are normalised too."""
    kind = getattr(getattr(gate.module, "spec", None), "kind", "softmax")
    return logsigmoid(logits_TE.float()) if kind == "sigmoid" else logits_TE


def _sum(value: Tensor, accelerator: Accelerator) -> Tensor:
    return cast(Tensor, accelerator.reduce(value, "sum"))
