"""What merges are made of: finetunes whole or pruned with one mask, pooled text, input norms.

I in features.
"""

from abc import ABC
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moiety.compose.builder import Builder
from moiety.compose.merged.conflict import input_norms
from moiety.compose.merged.packed import modules_at, pooled
from moiety.compose.recipe import Merge
from moiety.experts.prune import prune
from moiety.experts.settings import INTEGER_BITS, PruneSettings
from moiety.experts.stream import StreamedModel
from moiety.experts.unpack import dense_view


class MergeInputs(Builder, ABC):
    """The stages before a merge; which of them are run depends on the sparse mode."""

    @property
    def settings(self) -> Merge:
        """The recipe's section `compose`."""
        assert isinstance(self.recipe.compose, Merge)
        return self.recipe.compose

    @cached_property
    def experts(self) -> dict[str, Path]:
        """The finetunes pruned with one mask, if the merge is of such; no others are made."""
        if self.settings.sparse != "shared_mask":
            return {}
        return {name: self._masked(name) for name in self.recipe.names}

    @cached_property
    def pruning(self) -> PruneSettings:
        """How the result is pruned, calibrated on as many windows of each domain as one has."""
        settings = self.recipe.prune_settings()
        return replace(settings, windows=settings.windows * len(self.recipe.names))

    @property
    def floats(self) -> PruneSettings:
        """The same with floating-point values, which integers are rounded from at the end."""
        settings = self.pruning
        return replace(settings, values="fp32") if settings.values in INTEGER_BITS else settings

    @cached_property
    def modules(self) -> list[str]:
        """The matrices that are sparse in the result."""
        return modules_at(self.base.config, self.pruning.sites)

    @cached_property
    def texts(self) -> list[str]:
        """Calibration documents of all domains together."""
        return pooled({e.name: e.domain.documents() for e in self.recipe.experts})

    @property
    def work(self) -> Path:
        """Where an interrupted pruning keeps its finished blocks."""
        return self.stages.folder / "pruning"

    def _inputs(self, **settings: Any) -> dict[str, Any]:
        return self.stage_inputs(
            {
                "names": self.recipe.names,
                "seed": self.recipe.seed,
                "compose": self.settings.model_dump(),
                "prune": vars(self.pruning),
                **settings,
            }
        )

    @cached_property
    def mask(self) -> Path:
        """The base, pruned on all domains' text: its masks are everyone's."""
        inputs = {**self.inputs, "settings": vars(self.floats)}

        def make(scratch: Path) -> None:
            data, settings = self.texts, self.floats
            out = scratch / "model"
            prune(self.base.folder, out, data, settings, self.progress, work=self.work)

        return self.stages.run("shared-mask", inputs, make) / "model"

    def _masked(self, name: str) -> Path:
        settings = replace(self.floats, windows=self.recipe.calibration_windows)
        [expert] = [expert for expert in self.recipe.experts if expert.name == name]
        inputs = {
            "version": self.inputs["version"],
            "mask": self.mask.parent.name,
            "model": self.inputs["models"][name],
            "text": self.inputs["texts"][name],
            "settings": vars(settings),
        }

        def make(scratch: Path) -> None:
            prune(
                self.finetunes[name].folder,
                scratch / "model",
                list(expert.domain.documents()),
                settings,
                self.progress,
                masks=self.mask,
                work=self.work,
            )

        return self.stages.run(f"masked-{name}", inputs, make) / "model"

    @cached_property
    def sources(self) -> tuple[Mapping[str, Tensor], dict[str, Mapping[str, Tensor]]]:
        """Dense views of the base and the finetunes that are merged: with one mask, or whole."""
        if self.settings.sparse != "shared_mask":
            return self.base, dict(self.finetunes)
        views = {name: dense_view(folder) for name, folder in self.experts.items()}
        return dense_view(self.mask), dict(views)

    @cached_property
    def norms(self) -> dict[str, dict[str, Tensor]]:
        """Norms (I,) of each matrix's inputs in the base, by matrix, then by domain.

        All 1 for pruning by magnitude, which looks at no text.
        """
        if self.pruning.method == "magnitude":
            shapes = self.base.shapes()
            ones = {m: torch.ones(shapes[f"{m}.weight"][0][1]) for m in self.modules}
            return {m: dict.fromkeys(self.recipe.names, one) for m, one in ones.items()}
        found = {name: load_file(self._measured(name)) for name in self.recipe.names}
        return {m: {name: norms[m] for name, norms in found.items()} for m in self.modules}

    def _measured(self, name: str) -> Path:
        inputs = {
            "base": self.inputs["base"],
            "version": self.inputs["version"],
            "text": self.inputs["texts"][name],
            "settings": vars(self.pruning),
        }

        def make(scratch: Path) -> None:
            stream = StreamedModel(self.base.config, self.base)
            windows, size = self.calibration[name], self.recipe.batch_size
            norms = input_norms(stream, windows, self.pruning.sites, size, self.progress)
            save_file(norms, scratch / "norms.safetensors")

        return self.stages.run(f"norms-{name}", inputs, make) / "norms.safetensors"
