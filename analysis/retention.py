"""What sparsity does at home and away: every model on every domain.

M documents.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from torch import nn

from moiety.analysis.controls import heldout_windows
from moiety.analysis.losses import LabelledWindows
from moiety.analysis.results.measured import Interval
from moiety.analysis.results.retention import Retention
from moiety.analysis.statistics.measures import Floats
from moiety.compose.kinds import builder_of
from moiety.compose.opening import open_any
from moiety.compose.recipe import Recipe
from moiety.compose.stages import Stages
from moiety.errors import InputError
from moiety.progress import SILENT, Progress
from moiety.text import Windows

Open = Callable[[], nn.Module]


@dataclass(frozen=True)
class Models:
    """How to open each model; one at a time is in memory."""

    base: Open
    dense: Mapping[str, Open]
    sparse: Mapping[str, Open]
    composite: Open | None = None


def retention(
    recipe: Recipe, composite: str | Path | None, work: Path, progress: Progress = SILENT
) -> Retention:
    """Losses of a recipe's base, finetunes, sparse experts and composite on all held-out text.

    `work` holds the build's stages: experts that are not pruned yet are. Raises InputError when a
    domain has no held-out text.
    """
    builder = builder_of(recipe, Stages(work, progress), progress)
    models = Models(
        base=lambda: open_any(builder.base.folder).model,
        dense={
            name: lambda folder=finetune.folder: open_any(folder).model
            for name, finetune in builder.finetunes.items()
        },
        sparse={name: lambda name=name: builder.open_expert(name) for name in recipe.names},
        composite=None if composite is None else lambda: open_any(composite).model,
    )
    data = heldout_windows(recipe, builder.tokenizer)
    return retention_of(models, data, recipe.batch_size, recipe.seed, progress)


def retention_of(
    models: Models,
    data: Mapping[str, Windows],
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Retention:
    """As `retention`, of any models; experts and domains of one name are at home."""
    if set(models.dense) != set(models.sparse) or not models.dense:
        raise InputError(
            f"expected a sparse expert for each dense finetune, but they are "
            f"{sorted(models.sparse)} and {sorted(models.dense)}"
        )
    text = LabelledWindows.of(data)
    measured = _Measured(text, seed, _nats(models, text, batch_size, progress))
    return measured.result(tuple(models.dense))


def _nats(
    models: Models, text: LabelledWindows, batch_size: int, progress: Progress
) -> dict[tuple[str, str], Floats]:
    """Nats of every document under every model, (kind, expert) each."""
    cases: list[tuple[tuple[str, str], Open]] = [(("base", ""), models.base)]
    cases += [(("dense", name), opened) for name, opened in models.dense.items()]
    cases += [(("sparse", name), opened) for name, opened in models.sparse.items()]
    if models.composite is not None:
        cases.append((("composite", ""), models.composite))
    return {
        key: text.by_document(text.losses(opened().eval(), batch_size))
        for key, opened in progress.track(cases, "measure models", len(cases))
    }


class _Measured:
    """All losses by document, on their way to the result."""

    def __init__(
        self, text: LabelledWindows, seed: int, nats: dict[tuple[str, str], Floats]
    ) -> None:
        self.text, self.seed, self.nats = text, seed, nats
        self.documents = text.documents

    def result(self, experts: tuple[str, ...]) -> Retention:
        composite_M = self.nats.get(("composite", ""))
        change = {name: self.nats["sparse", name] - self.nats["dense", name] for name in experts}
        domains = self.text.domains
        home = [(name, change[name]) for name in experts if name in domains]
        away = [(d, change[name]) for name in experts for d in domains if d != name]
        sparse = {name: self.nats["sparse", name] for name in experts}
        return Retention(
            experts=experts,
            domains=domains,
            documents={n: len(w.document_W.unique()) for n, w in self.text.windows.items()},
            context_length=max(w.ids_WC.shape[1] for w in self.text.windows.values()),
            seed=self.seed,
            base=self.documents.by_domain(self.nats["base", ""]),
            dense=self._table("dense", experts),
            sparse=self._table("sparse", experts),
            change={name: self.documents.by_domain(nats_M) for name, nats_M in change.items()},
            home=self._mean(home),
            away=self._mean(away),
            retained=self._retained(sparse),
            composite=None if composite_M is None else self.documents.by_domain(composite_M),
            composite_retained=None
            if composite_M is None
            else self._retained(dict.fromkeys(experts, composite_M)),
        )

    def _table(self, kind: str, experts: tuple[str, ...]) -> dict[str, dict[str, Interval]]:
        return {name: self.documents.by_domain(self.nats[kind, name]) for name in experts}

    def _mean(self, pairs: list[tuple[str, Floats]]) -> Interval:
        if not pairs:
            return Interval(value=numpy.nan, low=numpy.nan, high=numpy.nan)
        return self.documents.mean_of(pairs)

    def _retained(self, after: Mapping[str, Floats]) -> dict[str, Interval]:
        """Share of each finetune's gain at home that is left."""
        base_M: Any = self.nats["base", ""]
        return {
            name: self.documents.ratio(name, base_M - nats_M, base_M - self.nats["dense", name])
            for name, nats_M in after.items()
            if name in self.text.domains
        }
