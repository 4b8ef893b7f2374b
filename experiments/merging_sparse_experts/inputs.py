"""The pruned models that are merged: made once, kept in a folder, found again.

I in features.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from moiety.compose import Recipe
from moiety.compose.merged.conflict import input_norms
from moiety.compose.merged.packed import modules_at, pooled
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.delta import TaskVector
from moiety.experts.preflight import load_tokenizer
from moiety.experts.prune import prune
from moiety.experts.settings import PruneSettings
from moiety.experts.stream import StreamedModel
from moiety.experts.unpack import dense_view
from moiety.progress import SILENT, Progress
from moiety.text import token_windows

Models = tuple[Mapping[str, Tensor], Mapping[str, Mapping[str, Tensor]]]
"""A base and its finetunes by name."""
SITES = "all"


class Inputs:
    """A recipe's finetunes, dense and pruned in every way that the experiment merges them."""

    def __init__(self, recipe: Recipe, work: Path, progress: Progress = SILENT) -> None:
        self.recipe, self.work, self.progress = recipe, work, progress

    @cached_property
    def finetunes(self) -> dict[str, Checkpoint]:
        """The dense finetunes."""
        return {expert.name: Checkpoint(expert.model) for expert in self.recipe.experts}

    @cached_property
    def modules(self) -> list[str]:
        """The matrices that are pruned."""
        return modules_at(Checkpoint(self.recipe.base).config, SITES)

    @cached_property
    def pooled_text(self) -> list[str]:
        """All domains' calibration text."""
        return pooled({e.name: list(e.domain.documents()) for e in self.recipe.experts})

    def settings(self, pattern: str) -> PruneSettings:
        """How one model is pruned, on as many windows whether of one domain or of all."""
        return PruneSettings(
            pattern=pattern,
            sites=SITES,
            values="fp32",
            context_length=self.recipe.context_length,
            windows=self.recipe.calibration_windows,
            batch_size=self.recipe.batch_size,
        )

    def pruned(self, pattern: str) -> dict[str, Mapping[str, Tensor]]:
        """Each finetune with a mask of its own."""
        return {name: dense_view(self._prune("own", name, pattern)) for name in self.recipe.names}

    def masked(self, pattern: str) -> Models:
        """The base and the finetunes, all with one mask."""
        mask = self.work / f"mask-{pattern.replace(':', '-')}"
        settings = self.settings(pattern)
        prune(self.recipe.base, mask, self.pooled_text, settings, self.progress, reuse=True)
        finetunes = {
            name: dense_view(self._prune("masked", name, pattern, masks=mask))
            for name in self.recipe.names
        }
        return dense_view(mask), finetunes

    def deltas(self, pattern: str) -> dict[str, dict[str, Tensor]]:
        """The base plus each finetune's pruned task vector."""
        return {
            name: dict(TaskVector(self._prune("delta", name, pattern, base=True)).tensors())
            for name in self.recipe.names
        }

    def _prune(
        self, kind: str, name: str, pattern: str, *, base: bool = False, masks: Path | None = None
    ) -> Path:
        out = self.work / f"{kind}-{name}-{pattern.replace(':', '-')}"
        prune(
            self.finetunes[name].folder,
            out,
            self._documents(name),
            self.settings(pattern),
            self.progress,
            base=self.recipe.base if base else None,
            masks=masks,
            reuse=True,
        )
        return out

    def _documents(self, name: str) -> Sequence[str]:
        [expert] = [expert for expert in self.recipe.experts if expert.name == name]
        return list(expert.domain.documents())

    @cached_property
    def norms(self) -> dict[str, dict[str, Tensor]]:
        """Norms (I,) of each matrix's inputs in the base, by matrix, then by domain."""
        base = Checkpoint(self.recipe.base)
        tokenizer, recipe = load_tokenizer(base.folder), self.recipe
        found: dict[str, dict[str, Tensor]] = {}
        for name in recipe.names:
            windows = token_windows(
                tokenizer, self._documents(name), recipe.context_length, recipe.calibration_windows
            )
            stream = StreamedModel(base.config, base)
            found[name] = input_norms(stream, windows, SITES, recipe.batch_size, self.progress)
        return {m: {name: norms[m] for name, norms in found.items()} for m in self.modules}
