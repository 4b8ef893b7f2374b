"""What a composite's shared part (everything that is not routed) is taken from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moiety.compose import merge
from moiety.compose.recipe import Merging, Mixture, Routed
from moiety.progress import SILENT, Progress
from moiety.routers import find_gates, forced, one_hot
from moiety.scoring import score
from moiety.text import Windows

CHOICE_WINDOWS = 32
WEIGHTS = (0.15, 0.25, 0.4, 0.6)


@dataclass(frozen=True)
class Candidate:
    """One source of the shared part.

    `source` is `base`, `soup`, `task_arithmetic` with its weight, or an expert's name; with
    `merging`, one of mergekit's methods.
    """

    source: str
    weight: float | None = None
    merging: Merging | None = field(default=None, compare=False)
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return self.source if self.weight is None else f"{self.source} {self.weight:g}"

    def tensors(
        self,
        base: Mapping[str, Tensor],
        finetunes: Mapping[str, Mapping[str, Tensor]],
        keep: Callable[[str], bool],
    ) -> Mapping[str, Tensor]:
        """The tensors whose name `keep` accepts."""
        if self.merging is not None:
            return merge.merged(base, finetunes, self.merging, keep, self.seed)
        if self.source in finetunes:
            return {name: finetunes[self.source][name] for name in base if keep(name)}
        match self.source:
            case "base":
                return {name: base[name] for name in base if keep(name)}
            case "soup":
                return merge.soup(finetunes, keep)
        assert self.weight is not None
        return merge.task_arithmetic(base, finetunes, self.weight, keep)


def candidates(settings: Mixture | Routed, seed: int = 0) -> list[Candidate]:
    """What `compose.shared` asks to be tried; random merges take `seed`."""
    if isinstance(settings.shared, Merging):
        return [Candidate(settings.shared.method, merging=settings.shared, seed=seed)]
    if settings.shared == "auto":
        weighted = [Candidate("task_arithmetic", weight) for weight in WEIGHTS]
        return [Candidate("base"), Candidate("soup"), *weighted]
    if settings.shared == "task_arithmetic":
        return [Candidate("task_arithmetic", settings.shared_weight)]
    return [Candidate(settings.shared)]


def choose(
    model: PreTrainedModel,
    tried: Sequence[Candidate],
    tensors_of: Callable[[Candidate], Mapping[str, Tensor]],
    data: Mapping[str, Windows],
    batch_size: int,
    progress: Progress = SILENT,
) -> dict[Candidate, float]:
    """Calibration loss of a composite under the oracle route for every candidate.

    `model` has the final experts, `data` calibration windows in the experts' order, of which the
    first `CHOICE_WINDOWS` are used; its shared part is overwritten. Domains count the same.
    """
    data = {name: windows.select(slice(CHOICE_WINDOWS)) for name, windows in data.items()}
    losses: dict[Candidate, float] = {}
    for candidate in progress.track(tried, "try shared parts", len(tried)):
        replace_shared(model, tensors_of(candidate))
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
