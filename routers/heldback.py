"""Solved gates on held-back text: how well they tell domains apart, and the best scale of logits.

B windows, C context length, T tokens (B x C flattened), W features of a gate, E experts.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.progress import SILENT, Progress
from moiety.routers import initialise
from moiety.routers.gates import Gate, Route, forced, one_hot, watched
from moiety.routers.passes import evaluating, run_decoder
from moiety.routers.router import Router
from moiety.routers.together import put
from moiety.text import Windows


@dataclass(frozen=True, kw_only=True)
class GateFit:
    """How well one gate tells the domains apart, on held-back text and oracle-routed states.

    `accuracy`: share of tokens whose largest logit is that of the own expert, per domain;
    `mean_accuracy`: domains counting the same; `cross_entropy`: nats to the own expert after
    scaling, own experts counting the same; `scale`: what the solution was multiplied by.
    """

    name: str
    layer: int
    accuracy: dict[str, float]
    mean_accuracy: float
    cross_entropy: float
    scale: float


@contextlib.contextmanager
def as_they_came_on_error(gates: Sequence[Gate]) -> Iterator[None]:
    """Give the gates their tensors back if the block ends in any error."""
    before = [
        {name: tensor.clone() for name, tensor in gate.module.state_dict().items()}
        for gate in gates
    ]
    try:
        yield
    except BaseException:
        for gate, tensors in zip(gates, before, strict=True):
            gate.module.load_state_dict(tensors)
        raise


def write(gates: Sequence[Gate], weights: Sequence[Tensor]) -> None:
    """Put weights into gates, in the gates' dtype.

    What chose experts beside the old weights, the selection bias of a sigmoid router, starts anew.
    """
    for gate, weight_EW in zip(gates, weights, strict=True):
        put(cast(Tensor, gate.module.weight), weight_EW)
        for bias_E in gate.module.buffers():
            bias_E.zero_()


def score(
    model: nn.Module,
    gates: Sequence[Gate],
    held_back: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    *,
    rescale: bool,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> list[GateFit]:
    """Measure the gates as they are on text they were not fitted on, each domain on its own route.

    Without `rescale` the scale stays 1. Raises InputError for logits that are not finite, naming
    the gate and the domain.
    """
    logits: dict[str, list[Tensor]] = {}
    with evaluating(model):
        for domain in progress.track(held_back, "held-back text", len(held_back)):
            logits[domain] = _logits(
                model, gates, held_back[domain], own_expert[domain], batch_size
            )
            _check_finite(gates, logits[domain], domain)
    return [
        _score(
            gate,
            {domain: of_gates[index] for domain, of_gates in logits.items()},
            own_expert,
            rescale=rescale,
        )
        for index, gate in enumerate(gates)
    ]


def _logits(
    model: nn.Module, gates: Sequence[Gate], windows: Windows, own: int, batch_size: int
) -> list[Tensor]:
    """What each gate says of every unpadded token: logits_TE on the CPU."""
    pieces: list[list[Tensor]] = [[] for _gate in gates]
    for batch in windows.batches(batch_size):
        kept_T = batch.mask_WC.flatten().bool()

        def listen(route: Route, kept_T: Tensor = kept_T) -> None:
            logits_TE = _token_logits(gates[route.layer], route)
            pieces[route.layer].append(logits_TE[kept_T.to(logits_TE.device)].float().cpu())

        with forced(gates, one_hot(own)), watched(gates, listen):
            run_decoder(model, batch)
    return [torch.cat(of_gate) for of_gate in pieces]


def _token_logits(gate: Gate, route: Route) -> Tensor:
    """A route's logits, before a sequence router adds them up over the tokens."""
    module = gate.module
    if not isinstance(module, Router) or module.spec.kind != "sequence":
        return route.logits_TE
    logits_TE = route.features_TW @ cast(Tensor, module.weight).float().T
    return logits_TE.abs() if module.spec.score == "absolute" else logits_TE


def _check_finite(gates: Sequence[Gate], logits: Sequence[Tensor], domain: str) -> None:
    for gate, logits_TE in zip(gates, logits, strict=True):
        if not bool(logits_TE.isfinite().all()):
            raise InputError(
                f"expected finite logits of {gate.name}, but held-back text of {domain!r} gives "
                "NaN or infinite values there; check the weights of the layers before it"
            )


def _score(
    gate: Gate, logits: Mapping[str, Tensor], own_expert: Mapping[str, int], *, rescale: bool
) -> GateFit:
    labels = {
        domain: torch.full((len(domain_TE),), own_expert[domain])
        for domain, domain_TE in logits.items()
    }
    accuracy = {
        domain: float((domain_TE.argmax(-1) == labels[domain]).float().mean())
        for domain, domain_TE in logits.items()
    }
    all_TE, label_T = torch.cat(list(logits.values())), torch.cat(list(labels.values()))
    scale = initialise.best_scale(all_TE, label_T) if rescale else 1.0
    return GateFit(
        name=gate.name,
        layer=gate.layer,
        accuracy=accuracy,
        mean_accuracy=sum(accuracy.values()) / len(accuracy),
        cross_entropy=initialise.label_loss(all_TE, label_T, scale),
        scale=scale,
    )
