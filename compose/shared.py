"""What a composite's shared part (everything that is not routed) is taken from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moiety.compose import merge
from moiety.compose.account import Use
from moiety.compose.merge.roles import BASE, roles
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
        """The tensors whose name `keep` accepts, each made when it is asked for."""
        names = list(filter(keep, base))
        if self.merging is None and self.source in ("base", *finetunes):
            return _Made(names, {"base": base, **finetunes}[self.source].__getitem__)
        like = next(iter(finetunes.values())) if self.source == "soup" else base
        merging = self._merging(len(finetunes))

        def make(name: str) -> Tensor:
            [(_, tensor)] = merge.streamed(like, finetunes, merging, [name], self.seed)
            return tensor

        return _Made(names, make)

    def _merging(self, finetunes: int) -> Merging:
        if self.merging is not None:
            return self.merging
        if self.source == "soup":
            return Merging(method="linear", parameters={"weight": 1 / finetunes})
        assert self.weight is not None
        return Merging(method="task_arithmetic", parameters={"weight": self.weight})


class _Made(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for, so that never more than one is in memory."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Tensor]) -> None:
        self._make = {name: partial(make, name) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


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


def use_of(source: str, owner: str | None, names: Sequence[str]) -> Use:
    """What became of an input's shared tensors (`owner` None: the base's) by a candidate's name."""
    method = source.partition(" ")[0]
    if method in ("base", *names):
        return "used" if method == (owner or "base") else "superseded"
    has_base = method != "soup" and roles(method, names)[0] == BASE
    return "merged" if owner is not None or has_base else "superseded"


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
