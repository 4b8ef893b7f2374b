"""Fit the gates of a composite in closed form: two passes over calibration text, no training.

W features of a gate, E experts.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.progress import SILENT, Progress
from moiety.routers import initialise
from moiety.routers.gates import Gate
from moiety.routers.heldback import GateFit, as_they_came_on_error, score, write
from moiety.routers.labelled import hold_back
from moiety.routers.passes import check_domains, linear_gates
from moiety.routers.router import Router
from moiety.routers.statistics import GateStatistics, collect, enough, stitched_windows
from moiety.text import Windows

Method = Literal["ridge", "logistic", "centroid", "prompts", "random", "zeros"]
CONTROLS = ("random", "prompts", "zeros")
COUNTS = (
    "shortest",
    "tokens",
    "held_back_tokens",
    "logistic_tokens",
    "minimum_tokens",
    "batch_size",
)


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How to fit gates.

    `penalty` is the L2 penalty of "ridge" and "logistic", relative to the size of the features;
    `stitch` is how many windows that switch domain are read for each of a domain's own, 0 for
    none, and `shortest` the fewest tokens between two switches; `tokens` is how many of each label
    are summed up at most, and so how much text is read, `held_back_tokens` how many of each
    domain the solution is scored on, `logistic_tokens` how many of each label "logistic" looks at;
    `minimum_tokens` is what every own expert needs; `batch_size` counts windows; `seed` is for
    "random" and for stitching.
    """

    method: Method = "logistic"
    penalty: float = 1e-2
    stitch: float = 0.5
    shortest: int = 32
    tokens: int = 16384
    held_back_tokens: int = 4096
    logistic_tokens: int = 4096
    minimum_tokens: int = 128
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(f"method must be one of {get_args(Method)}, but it is {self.method!r}")
        if not self.penalty > 0:
            raise InputError(f"penalty must be positive, but it is {self.penalty}")
        if not 0 <= self.stitch < float("inf"):
            raise InputError(f"stitch must be 0 or a positive number, but it is {self.stitch}")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        if self.seed < 0:
            raise InputError(f"seed must not be negative, but it is {self.seed}")


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What `fit` did.

    `method` is "given" when the weights came from the caller; `windows` counts the domains' own,
    `stitched` those made of several domains; `parameters` the entries of all gate weights.
    """

    gates: tuple[GateFit, ...]
    parameters: int
    seconds: float
    method: str
    windows: int
    stitched: int


def fit(
    model: nn.Module,
    data: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    settings: FitSettings | None = None,
    progress: Progress = SILENT,
    *,
    weights: Mapping[str, Tensor] | None = None,
    statistics: Sequence[GateStatistics] | None = None,
) -> FitReport:
    """Solve every gate for "send each domain to its own expert" and write it into the model.

    Weights change in place and keep their dtype; nothing else in the model changes, but for
    selection biases, which start at 0 again. Three quarters of a domain's documents give the
    statistics, as far as `tokens` of them go; the rest choose the scale of the logits (the controls
    "random", "prompts" and "zeros" keep scale 1) and measure accuracy. A domain with fewer than
    four windows is used for both.
    `weights`, by the gates' names, are scaled and written as they are (`initialise.arrow`);
    `statistics` of an earlier `collect` on `labelled.hold_back(data)[0]` save its pass.
    Raises InputError for gates that are not linear or have nothing to fit, absolute scores
    without given weights, domains without own expert, one expert only, too little text, weights
    or statistics of other gates, or NaN activations; the model is then unchanged.
    """
    settings = settings or FitSettings()
    started = time.perf_counter()
    gates = linear_gates(model)
    check_domains(data, own_expert, gates)
    kept, held_back = hold_back(data)
    _check_text(kept, own_expert, settings.minimum_tokens)
    solved, stitch = _solved(
        model, gates, kept, own_expert, settings, progress, weights=weights, statistics=statistics
    )
    with as_they_came_on_error(gates):
        write(gates, solved)
        fits = score(
            model,
            gates,
            {name: enough(text, settings.held_back_tokens) for name, text in held_back.items()},
            own_expert,
            rescale=weights is not None or settings.method not in CONTROLS,
            batch_size=settings.batch_size,
            progress=progress,
        )
        write(gates, [weight_EW * one.scale for weight_EW, one in zip(solved, fits, strict=True)])
    for one in fits:
        progress.note(f"{one.name}: accuracy {one.mean_accuracy:.3f}")
    return FitReport(
        gates=tuple(fits),
        parameters=sum(weight_EW.numel() for weight_EW in solved),
        seconds=time.perf_counter() - started,
        method=settings.method if weights is None else "given",
        windows=sum(map(len, data.values())),
        stitched=sum(stitched_windows(text, settings.tokens, stitch) for text in kept.values()),
    )


def _solved(
    model: nn.Module,
    gates: Sequence[Gate],
    data: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    settings: FitSettings,
    progress: Progress,
    *,
    weights: Mapping[str, Tensor] | None,
    statistics: Sequence[GateStatistics] | None,
) -> tuple[list[Tensor], float]:
    """Every gate's weight before scaling, and the stitched windows read for each of the own."""
    if weights is not None:
        return _given(gates, weights), 0.0
    if settings.method == "random":
        return [_random(gate, settings.seed) for gate in gates], 0.0
    if settings.method == "zeros":
        return [torch.zeros_like(_random(gate, 0)) for gate in gates], 0.0
    _check_scores(gates)
    stitch = 0.0 if settings.method == "prompts" or statistics else settings.stitch
    if statistics is None:
        statistics = _collect(model, gates, data, own_expert, settings, stitch, progress)
    return [_solve(one, settings) for one in _in_order(gates, statistics)], stitch


def _check_text(
    data: Mapping[str, Windows], own_expert: Mapping[str, int], minimum_tokens: int
) -> None:
    tokens: Counter[int] = Counter()
    for domain, windows in data.items():
        tokens[own_expert[domain]] += int(windows.mask_WC.sum())
    if len(tokens) < 2:
        raise InputError(
            f"expected text of at least two experts, but there is text of {len(tokens)}; "
            "give domains with different own experts"
        )
    expert, fewest = min(tokens.items(), key=lambda item: item[1])
    if fewest < minimum_tokens:
        raise InputError(
            f"expected at least {minimum_tokens} tokens an expert, but expert {expert} has "
            f"{fewest}; give more text or lower minimum_tokens"
        )


def _check_scores(gates: Sequence[Gate]) -> None:
    for gate in gates:
        if isinstance(gate.module, Router) and gate.module.spec.score == "absolute":
            raise InputError(
                f"expected weights for {gate.name}, whose score is |x·w| while solutions from text "
                "mind the sign; give those of arrow, or use score: linear"
            )


def _given(gates: Sequence[Gate], weights: Mapping[str, Tensor]) -> list[Tensor]:
    names = {gate.name for gate in gates}
    if set(weights) != names:
        raise InputError(
            f"expected weights for the gates {sorted(names)}, but there are weights for "
            f"{sorted(weights)}"
        )
    for gate in gates:
        expected = tuple(cast(Tensor, gate.module.weight).shape)
        if tuple(weights[gate.name].shape) != expected:
            raise InputError(
                f"expected a weight of shape {expected} for {gate.name}, but it is "
                f"{tuple(weights[gate.name].shape)}"
            )
    return [weights[gate.name].detach().float() for gate in gates]


def _random(gate: Gate, seed: int) -> Tensor:
    experts, width = cast(Tensor, gate.module.weight).shape
    return initialise.random(experts, width, seed + gate.layer)


def _collect(
    model: nn.Module,
    gates: Sequence[Gate],
    data: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    settings: FitSettings,
    stitch: float,
    progress: Progress,
) -> list[GateStatistics]:
    return collect(
        model,
        gates,
        data,
        own_expert,
        stitch=stitch,
        shortest=settings.shortest,
        tokens=settings.tokens,
        sample=settings.logistic_tokens if settings.method == "logistic" else 0,
        own_routes=settings.method != "prompts",
        seed=settings.seed,
        batch_size=settings.batch_size,
        progress=progress,
    )


def _in_order(
    gates: Sequence[Gate], statistics: Sequence[GateStatistics]
) -> Sequence[GateStatistics]:
    expected = [(gate.name, tuple(cast(Tensor, gate.module.weight).shape)) for gate in gates]
    found = [(one.name, tuple(one.sum_EW.shape)) for one in statistics]
    if found != expected:
        raise InputError(
            f"expected statistics of the gates {expected}, but they are of {found}; collect them "
            "again"
        )
    return statistics


def _solve(statistics: GateStatistics, settings: FitSettings) -> Tensor:
    if settings.method == "ridge":
        return initialise.ridge(statistics, settings.penalty)
    if settings.method == "logistic":
        return initialise.logistic(statistics, settings.penalty)
    if settings.method == "prompts":
        return initialise.prompts(statistics)
    return initialise.centroid(statistics)
