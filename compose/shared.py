"""What a mixture's shared part (attention, norms, embeddings, head) is taken from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moiety.compose import merge
from moiety.compose.mixture import is_ffn
from moiety.compose.recipe import Compose
from moiety.experts.checkpoint import Checkpoint
from moiety.progress import SILENT, Progress
from moiety.routers import find_gates, forced, one_hot
from moiety.scoring import score
from moiety.text import Windows

CHOICE_WINDOWS = 32
WEIGHTS = (0.15, 0.25, 0.4, 0.6)


@dataclass(frozen=True)
class Candidate:
    """One source of the shared part: `base`, `soup` or `task_arithmetic` with its weight."""

    source: str
    weight: float | None = None

    def __str__(self) -> str:
        return self.source if self.weight is None else f"{self.source} {self.weight:g}"

    def tensors(
        self, base: Checkpoint, finetunes: Mapping[str, Checkpoint]
    ) -> Mapping[str, Tensor]:
        """The shared tensors by name (no FFN)."""
        match self.source:
            case "base":
                return {name: base[name] for name in base if not is_ffn(name)}
            case "soup":
                return merge.soup(finetunes, _shared)
        assert self.weight is not None
        return merge.task_arithmetic(base, finetunes, self.weight, _shared)


def _shared(name: str) -> bool:
    return not is_ffn(name)


def candidates(settings: Compose) -> list[Candidate]:
    """What `compose.shared` asks to be tried."""
    if settings.shared == "auto":
        weighted = [Candidate("task_arithmetic", weight) for weight in WEIGHTS]
        return [Candidate("base"), Candidate("soup"), *weighted]
    if settings.shared == "task_arithmetic":
        return [Candidate("task_arithmetic", settings.shared_weight)]
    return [Candidate(settings.shared)]


def choose(
    model: PreTrainedModel,
    base: Checkpoint,
    finetunes: Mapping[str, Checkpoint],
    data: Mapping[str, Windows],
    tried: list[Candidate],
    batch_size: int,
    progress: Progress = SILENT,
) -> dict[Candidate, float]:
    """Calibration loss of the mixture under the oracle route for every candidate.

    `model` is a mixture of the final experts, `data` calibration windows in the experts' order,
    of which the first `CHOICE_WINDOWS` are used; its shared part is overwritten. Domains count
    the same.
    """
    data = {name: windows.select(slice(CHOICE_WINDOWS)) for name, windows in data.items()}
    losses: dict[Candidate, float] = {}
    for candidate in progress.track(tried, "try shared parts", len(tried)):
        replace_shared(model, candidate.tensors(base, finetunes))
        losses[candidate] = sum(_oracle_losses(model, data, batch_size)) / len(data)
        progress.note(f"shared part from {candidate}: {losses[candidate]:.4f}")
    return losses


def _oracle_losses(
    model: PreTrainedModel, data: Mapping[str, Windows], batch_size: int
) -> Iterator[float]:
    gates = find_gates(model)
    for index, windows in enumerate(data.values()):
        with forced(gates, one_hot(index)):
            yield score(model, windows, batch_size).loss


@torch.no_grad()
def replace_shared(model: PreTrainedModel, shared: Mapping[str, Tensor]) -> None:
    """Copy shared tensors into a model whose names for them are the base's."""
    for name, tensor in shared.items():
        model.get_parameter(name).copy_(tensor)
