"""How to train gates, and what training reports."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moiety.errors import InputError
from moiety.routers.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train gates.

    A step takes `windows_per_domain` windows of every domain, over all processes together. The
    loss is next-token loss + `domain_weight` · domain loss + `balance_weight` · balance loss +
    `z_weight` · z loss, each gate loss averaged over layers. `batch_size` counts the windows of
    an evaluation batch. Training stops after `steps`, or after `patience` evaluations (one
    every `eval_every` steps) without a better held-out loss. `max_gradient` clips the norm of
    the gradient over all gates. `checkpoint` is a folder to go on from, None for none.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    windows_per_domain: int = 2
    domain_weight: float = 0.1
    balance_weight: float = 1e-3
    z_weight: float = 1e-5
    max_gradient: float = 1.0
    eval_every: int = 20
    patience: int = 5
    batch_size: int = 8
    seed: int = 0
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "windows_per_domain", "eval_every", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        for name in ("learning_rate", "max_gradient"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, but it is {getattr(self, name)}")
        for name in ("domain_weight", "balance_weight", "z_weight", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must not be negative, but it is {getattr(self, name)}")

    def of_run(self) -> dict[str, Any]:
        """What decides the result: all but the place of the checkpoint."""
        values = asdict(self)
        del values["checkpoint"]
        return values


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What `train` did.

    `parameters` counts the trained entries and `trained` names their tensors; `steps` were taken
    in all; `history` starts with the gates as they came; `best_step` is that of the gates now in
    the model. Losses are held-out nats per token, domains counting the same. `seconds` is this
    call's, without the time before a resumption.
    """

    parameters: int
    trained: tuple[str, ...]
    steps: int
    best_step: int
    start_loss: float
    best_loss: float
    history: tuple[Evaluation, ...]
    seconds: float
