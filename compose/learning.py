"""Learn a composite's gates from labelled text: closed-form start, then gate-only training."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moiety.compose.arrow import arrow_weights
from moiety.compose.composite import (
    Composite,
    Spread,
    gate_weights,
    open_composite,
    save_gates,
)
from moiety.compose.recipe import Route
from moiety.errors import InputError
from moiety.files import check_writable, write_json
from moiety.progress import SILENT, Progress
from moiety.routers import (
    FitReport,
    FitSettings,
    TrainReport,
    TrainSettings,
    find_gates,
    fit,
    train,
)
from moiety.routers.checkpoint import fingerprint
from moiety.routers.kept import collect_or_keep
from moiety.routers.labelled import hold_back
from moiety.routers.masters import Masters
from moiety.routers.objective import check_objective
from moiety.routers.passes import input_device, linear_gates
from moiety.routers.start import load_start, save_start
from moiety.routers.statistics import GateStatistics
from moiety.routers.together import from_first, is_first, join
from moiety.text import Windows, read_documents, token_windows

SUMMED = ("ridge", "logistic", "centroid")
"""Starts that need nothing of a domain's text but sums over it."""
Statistics = Path | Sequence[GateStatistics] | None


@dataclass(frozen=True)
class RouteReport:
    """How the gates were learned.

    `fitted` is None for routers that learn nothing, `training` when no step was asked for.
    """

    fitted: FitReport | None
    training: TrainReport | None

    @property
    def parameters(self) -> int:
        """Number of trainable parameters: exactly the gates'."""
        return self.fitted.parameters if self.fitted else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        training = None if self.training is None else asdict(self.training)
        fitted = None if self.fitted is None else asdict(self.fitted)
        return {"parameters": self.parameters, "fit": fitted, "training": training}


def route(
    model: str | Path,
    data: Mapping[str, str | Path],
    settings: Route | None = None,
    *,
    context_length: int = 512,
    windows: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    checkpoint: Path | None = None,
    trackers: Sequence[str] = (),
    log_dir: Path | None = None,
    statistics: Path | None = None,
    spread: Spread = "none",
    progress: Progress = SILENT,
) -> RouteReport:
    """Fit and train the gates of the composite in folder `model` and save them there.

    `data` gives each domain's calibration text under its expert's name. Everything but the gates
    stays as it is, in memory and on disk. With `checkpoint`, a folder, a stopped run goes on
    where it was, on any number of processes; `trackers` are accelerate's by name, `log_dir` where
    those that need it write. `statistics` is a folder in which what gates saw is kept from one
    fit to the next, so that an added domain is read alone. Under `torchrun` or `accelerate launch` the windows of a training
    step are shared out among the processes, and `spread` says what of the model each holds (see
    `open_composite`); the first one writes.
    """
    documents = {domain: read_documents(path) for domain, path in data.items()}
    folder = Path(model)
    if not folder.is_dir():
        raise InputError(f"expected a composite's folder at {folder}, but there is none")
    check_writable(folder)
    composite = open_composite(folder, spread=spread)
    join(input_device(composite.model))
    composite.own_expert(data)
    cut = {
        domain: _cut(domain, texts, composite.tokenizer, context_length, windows)
        for domain, texts in documents.items()
    }
    report = route_model(
        composite,
        cut,
        settings or Route(),
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        trackers=trackers,
        log_dir=log_dir,
        statistics=statistics,
        progress=progress,
    )
    gates = gate_weights(composite.model)

    def save() -> None:
        save_gates(folder, gates)
        write_json(folder / "route.json", report.to_dict())

    from_first(save)
    return report


def _cut(domain: str, texts: Sequence[str], tokenizer: Any, length: int, count: int) -> Windows:
    """A domain's windows; what is wrong with its text is said of it."""
    try:
        return token_windows(tokenizer, texts, length, count)
    except InputError as error:
        raise InputError(f"text of {domain!r}: {error}") from error


def route_model(
    composite: Composite,
    data: Mapping[str, Windows],
    settings: Route,
    *,
    batch_size: int = 8,
    seed: int = 0,
    checkpoint: Path | None = None,
    trackers: Sequence[str] = (),
    log_dir: Path | None = None,
    statistics: Statistics = None,
    progress: Progress = SILENT,
) -> RouteReport:
    """Fit and train the gates of an open composite in place.

    The closed form sees all of `data`; training learns on three quarters of the documents and
    keeps the gates that do best on the last quarter, which may be those it started from. Routers
    of a kind that learns nothing stay as they are. Several processes fit the same and go on from
    what the first one has. `statistics` is a folder as in `route`, or what `collect` found in
    `labelled.hold_back(data)[0]`, which then is not read again.
    """
    own_expert = composite.own_expert(data)
    progress = progress if is_first() else SILENT
    if not any(True for gate in find_gates(composite.model) for _ in gate.module.parameters()):
        return RouteReport(None, None)
    learning = _training(settings, batch_size, seed, checkpoint, trackers, log_dir)
    if learning is not None:
        check_objective(find_gates(composite.model), learning)
    gates = Masters(find_gates(composite.model))
    run = _name(composite, data, settings, gates, batch_size, seed) if checkpoint else ""
    fitted = checkpoint and _again(checkpoint, run, gates)
    if not fitted:
        fitted = _fit(composite, data, own_expert, settings, batch_size, seed, statistics, progress)
        found = gates.snapshot()
        gates.write_gates(from_first(lambda: found))
        if checkpoint:
            from_first(lambda: save_start(checkpoint, run, found, fitted))
    if learning is None:
        return RouteReport(fitted, None)
    parts = {domain: windows.hold_back() for domain, windows in data.items()}
    training = train(
        composite.model,
        {domain: part[0] for domain, part in parts.items()},
        {domain: part[1] for domain, part in parts.items()},
        own_expert,
        learning,
        progress,
    )
    return RouteReport(fitted, training)


def _training(
    settings: Route,
    batch_size: int,
    seed: int,
    checkpoint: Path | None,
    trackers: Sequence[str],
    log_dir: Path | None,
) -> TrainSettings | None:
    """How to train, None for no step."""
    if settings.train_steps == 0:
        return None
    return TrainSettings(
        steps=settings.train_steps,
        objective=settings.objective,
        learning_rate=settings.learning_rate,
        domain_weight=settings.domain_weight,
        balance=settings.balance,
        balance_weight=settings.balance_weight,
        z_weight=settings.z_weight,
        switching=settings.stitch > 0,
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        trackers=tuple(trackers),
        log_dir=log_dir,
    )


def _name(
    composite: Composite,
    data: Mapping[str, Windows],
    settings: Route,
    gates: Masters,
    batch_size: int,
    seed: int,
) -> str:
    """What tells this run from others, whatever the gates are that it starts from."""
    text = {f"{name}/ids": windows.ids_WC for name, windows in data.items()}
    text |= {f"{name}/mask": windows.mask_WC for name, windows in data.items()}
    values = {**settings.model_dump(), "batch_size": batch_size, "seed": seed}
    return fingerprint(composite.model, values, text, without=gates.names)


def _again(folder: Path, run: str, gates: Masters) -> FitReport | None:
    """The fit that a stopped run finished, its gates put into the model; None if there is none."""
    kept = from_first(lambda: load_start(folder, run))
    if kept is None:
        return None
    weights, report = kept
    gates.write_gates(weights)
    return report


def _fit(
    composite: Composite,
    data: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    settings: Route,
    batch_size: int,
    seed: int,
    statistics: Statistics,
    progress: Progress,
) -> FitReport:
    """The closed-form start; `arrow` needs no text but for the scale of its logits."""
    if statistics is not None and settings.init not in SUMMED:
        raise InputError(
            f"statistics are kept for init {', '.join(SUMMED)}, but it is {settings.init}; leave "
            "them out"
        )
    chosen = FitSettings(
        method="random" if settings.init == "arrow" else settings.init,
        penalty=settings.penalty,
        stitch=settings.stitch,
        batch_size=batch_size,
        seed=seed,
    )
    weights = arrow_weights(composite.model) if settings.init == "arrow" else None
    kept = None if isinstance(statistics, Path) else statistics
    if isinstance(statistics, Path):
        text, gates = hold_back(data)[0], linear_gates(composite.model)
        kept = collect_or_keep(
            statistics, composite.model, gates, text, own_expert, chosen, progress
        )
    return fit(
        composite.model, data, own_expert, chosen, progress, weights=weights, statistics=kept
    )
