"""Fit the gates of a composite in closed form: two passes over calibration text, no training.

T tokens, D model width, E experts.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.progress import SILENT, Progress
from moiety.routers import initialise
from moiety.routers.gates import Gate, Route, forced, one_hot, watched
from moiety.routers.passes import check_domains, evaluating, linear_gates, run_decoder
from moiety.routers.statistics import GateStatistics, collect
from moiety.text import Windows

Method = Literal["ridge", "centroid", "random"]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How to fit gates.

    `penalty` is ridge's, relative to the mean diagonal of the Gram matrix; `minimum_tokens` is
    what every own expert needs; `batch_size` counts windows; `seed` is used by "random" only.
    """

    method: Method = "ridge"
    penalty: float = 1e-2
    minimum_tokens: int = 128
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(f"method must be one of {get_args(Method)}, but it is {self.method!r}")
        if not self.penalty > 0:
            raise InputError(f"penalty must be positive, but it is {self.penalty}")
        for name in ("minimum_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")


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


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What `fit` did; `parameters` counts the entries of all gate weights."""

    gates: tuple[GateFit, ...]
    parameters: int
    seconds: float


def fit(
    model: nn.Module,
    data: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    settings: FitSettings | None = None,
    progress: Progress = SILENT,
) -> FitReport:
    """Solve every gate for "send each domain to its own expert" and write it into the model.

    Weights change in place and keep their dtype; nothing else in the model changes. Three
    quarters of a domain's documents give the statistics; the rest choose the scale of the logits
    (method "random" keeps scale 1, as it is a control) and measure accuracy. A domain with
    fewer than four windows is used for both. Raises InputError for gates that are not linear,
    domains without own expert, too little text, or NaN activations; the model is then
    unchanged.
    """
    settings = settings or FitSettings()
    started = time.perf_counter()
    gates = linear_gates(model)
    check_domains(data, own_expert, gates)
    kept, held_back = _split(data)
    statistics = collect(
        model, gates, kept, own_expert, batch_size=settings.batch_size, progress=progress
    )
    weights = [_solve(gate_statistics, settings) for gate_statistics in statistics]
    logits = _held_back_logits(
        model, gates, weights, held_back, own_expert, settings.batch_size, progress
    )
    fits = [
        _score(
            gate,
            {name: domain[gate.layer] for name, domain in logits.items()},
            own_expert,
            rescale=settings.method != "random",
        )
        for gate in gates
    ]
    for gate, weight_ED, gate_fit in zip(gates, weights, fits, strict=True):
        _write(gate, weight_ED * gate_fit.scale)
        progress.note(f"{gate.name}: accuracy {gate_fit.mean_accuracy:.3f}")
    return FitReport(
        gates=tuple(fits),
        parameters=sum(weight_ED.numel() for weight_ED in weights),
        seconds=time.perf_counter() - started,
    )


def _split(data: Mapping[str, Windows]) -> tuple[dict[str, Windows], dict[str, Windows]]:
    kept, held_back = dict(data), dict(data)
    for domain, windows in data.items():
        early, late = windows.hold_back()
        if len(late) > 0:
            kept[domain], held_back[domain] = early, late
    return kept, held_back


def _solve(statistics: GateStatistics, settings: FitSettings) -> Tensor:
    initialise.check_labels(statistics, settings.minimum_tokens)
    if settings.method == "ridge":
        return initialise.ridge(statistics, settings.penalty)
    if settings.method == "centroid":
        return initialise.centroid(statistics)
    experts, width = statistics.sum_ED.shape
    return initialise.random(experts, width, settings.seed + statistics.layer)


def _held_back_logits(
    model: nn.Module,
    gates: Sequence[Gate],
    weights: Sequence[Tensor],
    held_back: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    batch_size: int,
    progress: Progress,
) -> dict[str, list[Tensor]]:
    """Per domain and gate, what the new weights say of held-back tokens: logits_TE on the CPU."""
    logits: dict[str, list[Tensor]] = {}
    with evaluating(model):
        for domain in progress.track(held_back, "held-back text", len(held_back)):
            pieces: list[list[Tensor]] = [[] for _gate in gates]
            for batch in held_back[domain].batches(batch_size):
                kept_T = batch.mask_WC.flatten().bool()

                def listen(
                    route: Route, kept_T: Tensor = kept_T, pieces: list[list[Tensor]] = pieces
                ) -> None:
                    hidden_TD = route.hidden_TD[kept_T.to(route.hidden_TD.device)].float()
                    weight_ED = weights[route.layer].to(hidden_TD.device)
                    pieces[route.layer].append((hidden_TD @ weight_ED.T).cpu())

                with forced(gates, one_hot(own_expert[domain])), watched(gates, listen):
                    run_decoder(model, batch)
            logits[domain] = [torch.cat(gate_pieces) for gate_pieces in pieces]
    return logits


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


def _write(gate: Gate, weight_ED: Tensor) -> None:
    target_ED = cast(Tensor, gate.module.weight)
    with torch.no_grad():
        target_ED.copy_(weight_ED)
