"""How to train gates, and what training reports."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moiety.errors import InputError
from moiety.routers.evaluation import Evaluation
from moiety.routers.tracking import check_trackers

Objective = Literal["language", "distill", "domain", "regret"]
Balance = Literal["loss", "bias", "none"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train gates.

    A step takes `windows_per_domain` windows of every domain, over all processes together. The
    loss is the objective + `domain_weight` · domain loss + `balance_weight` · balance loss +
    `z_weight` · z loss, each gate loss averaged over layers. Objectives: `language`, next-token
    loss; `distill`, the divergence from the next-token distribution of the own expert alone;
    `domain`, the domain loss itself (with weight 1); `regret`, the loss of the experts that a
    gate expects each token to get, above the best one's (a pass without gradient per expert).

    `balance`: `loss`, the balance loss; `bias`, no loss but `bias_step` up or down a step on the
    gates' selection bias (arXiv:2408.15664); `none`. `switching`: train and judge also on windows
    that switch domain inside, stitched from the given ones and counting as one more domain; a
    gate that sees earlier tokens otherwise learns never to let go of them. `batch_size` counts the windows of an
    evaluation batch. Training stops after `steps`, or after `patience` evaluations (one every
    `eval_every` steps) without a lower held-out regret. `max_gradient` clips the norm of the
    gradient over all gates. `checkpoint` is a folder to go on from, None for none. `trackers`
    are accelerate's by name ("tensorboard", "trackio", ...); those that write files write under
    `log_dir`.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    windows_per_domain: int = 2
    objective: Objective = "language"
    domain_weight: float = 0.1
    balance: Balance = "loss"
    balance_weight: float = 1e-3
    bias_step: float = 1e-3
    z_weight: float = 1e-5
    switching: bool = True
    max_gradient: float = 1.0
    eval_every: int = 20
    patience: int = 5
    batch_size: int = 8
    seed: int = 0
    checkpoint: Path | None = None
    trackers: tuple[str, ...] = ()
    log_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "windows_per_domain", "eval_every", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        for name in ("learning_rate", "max_gradient", "bias_step"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, but it is {getattr(self, name)}")
        for name in ("domain_weight", "balance_weight", "z_weight", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must not be negative, but it is {getattr(self, name)}")
        for name, names in (("objective", get_args(Objective)), ("balance", get_args(Balance))):
            if getattr(self, name) not in names:
                raise InputError(
                    f"{name} must be one of {', '.join(names)}, but it is {getattr(self, name)!r}"
                )
        check_trackers(self.trackers, self.log_dir)

    def of_run(self) -> dict[str, Any]:
        """What decides the result: all but the places of the checkpoint and of the log."""
        values = asdict(self)
        for name in ("checkpoint", "trackers", "log_dir"):
            del values[name]
        return values

    def loss_weights(self) -> dict[str, float]:
        """What each part of the loss is multiplied with; parts that do not count are left out."""
        domain = 1.0 if self.objective == "domain" else self.domain_weight
        weights = {
            "domain": domain,
            "balance": self.balance_weight if self.balance == "loss" else 0.0,
            "z": self.z_weight,
        }
        weights.setdefault(self.objective, 1.0)
        return {name: weight for name, weight in weights.items() if weight > 0}


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What `train` did.

    `parameters` counts the trained entries and `trained` names their tensors; `balanced` names
    the selection biases that loss-free balancing moved, which are no parameters. `steps` were
    taken in all; `history` starts with the gates as they came; `best_step` is that of the gates
    now in the model. Losses are held-out nats per token, domains counting the same;
    `oracle_losses` are those of the route to each domain's own expert, and regret is the loss
    above their mean. `seconds` is this call's, without the time before a resumption.
    """

    parameters: int
    trained: tuple[str, ...]
    balanced: tuple[str, ...]
    objective: str
    steps: int
    best_step: int
    start_loss: float
    best_loss: float
    start_regret: float
    best_regret: float
    oracle_losses: Mapping[str, float]
    history: tuple[Evaluation, ...]
    seconds: float
