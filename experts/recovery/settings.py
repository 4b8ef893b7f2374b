"""How to train after pruning, and what training reports."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moiety.errors import InputError

POSITIVE_COUNTS = (
    "context_length",
    "windows",
    "batch_size",
    "micro_batch",
    "steps",
    "eval_every",
    "patience",
)


@dataclass(frozen=True, kw_only=True)
class RecoverySettings:
    """What every way of training a pruned model is told.

    The loss is `cross_entropy` · next-token loss + `kl` · temperature² · KL(teacher ‖ student),
    both at `temperature` for the latter, + `square_head` · the hidden states' relative error
    summed over layers. At most `windows` windows of `context_length` tokens are read; every
    `held_every`-th document is held back, to choose the best step by. A step takes `batch_size`
    windows over all processes together, `micro_batch` at a time in each, with AdamW at `rate`
    (what it is relative to is the method's own), warmed up over a twentieth of the steps and
    then a cosine to 0. Training stops after `steps`, or after `patience` evaluations (one every
    `eval_every` steps) that are not better. `max_gradient` clips the gradient's norm.
    `mixed_precision` is accelerate's `no` or `bf16`; `activation_checkpointing` saves
    memory for time. `checkpoint` is a folder to go on from, None for none.
    """

    cross_entropy: float = 1.0
    kl: float = 1.0
    square_head: float = 1.0
    temperature: float = 1.0
    context_length: int = 512
    windows: int = 2048
    held_every: int = 8
    batch_size: int = 8
    micro_batch: int = 8
    steps: int = 200
    rate: float = 1e-3
    weight_decay: float = 0.0
    max_gradient: float = 1.0
    eval_every: int = 20
    patience: int = 5
    mixed_precision: str = "no"
    activation_checkpointing: bool = False
    seed: int = 0
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        losses = ("cross_entropy", "kl", "square_head")
        for name in POSITIVE_COUNTS:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("context_length", self.context_length >= 2, "at least 2")
        self._require("held_every", self.held_every >= 2, "at least 2")
        for name in ("temperature", "rate", "max_gradient"):
            self._require(name, getattr(self, name) > 0, "positive")
        for name in (*losses, "weight_decay", "seed"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        if not any(getattr(self, name) for name in losses):
            raise InputError(f"one of {', '.join(losses)} must be positive, but all are 0")
        known = ("no", "bf16")
        self._require("mixed_precision", self.mixed_precision in known, "no or bf16")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {rule}, but it is {getattr(self, name)!r}")

    def of_run(self) -> dict[str, Any]:
        """What decides the result: all but the place of the checkpoint."""
        values = asdict(self)
        del values["checkpoint"]
        return values


@dataclass(frozen=True, kw_only=True)
class DistillSettings(RecoverySettings):
    """How to train the kept values themselves.

    `rate` is a share of each tensor's root-mean-square value, so that one rate suits models of
    any scale. `train` is `kept` (the kept values of the packed matrices) or `all` (embeddings,
    norms, biases and unpruned matrices too).
    """

    rate: float = 0.005
    train: str = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("train", self.train in ("kept", "all"), "kept or all")


@dataclass(frozen=True, kw_only=True)
class LoraSettings(RecoverySettings):
    """How to train a low-rank change of the kept values: (B A · `alpha` / `rank`) ⊙ mask.

    `rate` is AdamW's own, as for any LoRA; `rank_stabilised` scales by alpha / √rank instead
    (Kalajdzievski 2023, arXiv:2312.03732).
    """

    rate: float = 1e-3
    rank: int = 16
    alpha: float = 32.0
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("rank", self.rank >= 1, "at least 1")
        self._require("alpha", self.alpha > 0, "positive")


@dataclass(frozen=True)
class Evaluation:
    """Held-back loss after a step, in nats a token."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class RecoveryReport:
    """What recovery did; also `recovery.json` beside the weights.

    Losses are nats a token on the held-back documents at `context_length`: of the packed model
    as it came, as it was written, and of the dense teacher. `parameters` counts the trained
    entries; `best_step` is the step that was written, 0 for the model as it came. `seconds` is
    this call's, without the time before a resumption.
    """

    method: str
    settings: dict[str, Any]
    sparse: str
    teacher: str
    context_length: int
    training_windows: int
    held_tokens: int
    parameters: int
    loss_before: float
    loss_after: float
    loss_teacher: float
    steps: int
    best_step: int
    history: tuple[Evaluation, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        return asdict(self)
