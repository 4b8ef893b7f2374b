"""Training runs that one and two processes both do."""

from types import ModuleType

from torch import nn

from moiety.progress import SILENT, Progress
from moiety.routers import Router, TrainReport, TrainSettings, find_gates, train
from moiety.routers.spec import RouterSpec


def _settings(**changes: object) -> TrainSettings:
    values = {
        "steps": 6,
        "eval_every": 3,
        "windows_per_domain": 1,
        "batch_size": 2,
        "balance_weight": 0.1,
        "z_weight": 0.01,
        **changes,
    }
    return TrainSettings(**values)  # pyright: ignore[reportArgumentType]


SETTINGS = {
    "language": _settings(windows_per_domain=2),
    "distill": _settings(objective="distill"),
    "domain": _settings(objective="domain"),
    "regret": _settings(objective="regret"),
    "bias": _settings(balance="bias"),
}


def with_sigmoid_gates(model: nn.Module) -> nn.Module:
    """The model with our own sigmoid routers, which prefer no expert yet, for its gates."""
    spec = RouterSpec(kind="sigmoid", top_k=2)
    for gate in find_gates(model):
        router = Router(gate.module.get_parameter("weight").shape[1], gate.experts, spec)
        model.get_submodule(gate.name.removesuffix(".gate")).gate = router
    return model


def model_of(toys: ModuleType, name: str) -> nn.Module:
    """The fresh tiny model that the run of this name trains."""
    return with_sigmoid_gates(toys.mixtral()) if name == "bias" else toys.mixtral()


def run(
    toys: ModuleType,
    model: nn.Module,
    settings: TrainSettings,
    progress: Progress = SILENT,
) -> TrainReport:
    """Train on a little text of the planted domains."""
    data, heldout = toys.domains(5), toys.domains(3, seed=1)
    return train(model, data, heldout, toys.OWN, settings, progress)
