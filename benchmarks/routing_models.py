"""The composites that routers are judged in, all of one recipe's finetunes, each built as a recipe.

Stages that routers share (pruned experts, the shared part) are made once in one work folder.

L layers, E experts, D model width.
"""

import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from mergekit.merge import MergeOptions
from mergekit.moe.config import MoEMergeConfig
from mergekit.scripts.moe import build as mergekit_moe
from torch import Tensor

from moiety.compose.composite import Composite, open_composite
from moiety.compose.kinds import builder_of
from moiety.compose.learning import SUMMED, route_model
from moiety.compose.recipe import Recipe
from moiety.compose.routing import RoutingBuilder
from moiety.compose.stages import Stages
from moiety.experts.checkpoint import Checkpoint
from moiety.files import digest
from moiety.progress import SILENT, Progress
from moiety.routers import FitSettings, GateStatistics, collect, find_gates
from moiety.routers.labelled import hold_back
from moiety.routers.passes import linear_gates
from moiety.text import Windows, write_documents

Kind = Literal["routed", "mixture"]
KINDS: dict[Kind, dict[str, Any]] = {
    "routed": {"kind": "routed", "norms": "routed"},
    "mixture": {"kind": "mixture"},
}
SITES: dict[Kind, str] = {"routed": "all", "mixture": "ffn"}
PROMPTS, PROMPT_TOKENS = 24, 64
Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A composite and the seconds that its gates took, 0 where nothing was fitted."""

    composite: Composite
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What gates saw of the calibration text, and the seconds that it took to read it."""

    statistics: list[GateStatistics]
    seconds: float


@dataclass(frozen=True)
class Workshop:
    """Builds composites of one recipe in folder `work`, and opens them.

    With `sharing`, routers whose gates see the same read the calibration text once together; the
    time of that pass counts for each.
    """

    recipe: Recipe
    work: Path
    fit_windows: int | None = None
    sharing: bool = True
    progress: Progress = field(default=SILENT)
    _sums: dict[str, Sums] = field(default_factory=dict, repr=False)

    def make(
        self, kind: Kind, top_k: int, router: Settings | None = None, route: Settings | None = None
    ) -> Made:
        """The composite with these sections `compose.router` and `route`; opened anew.

        Without `route` its gates prefer no expert. With `fit_windows` gates are fitted and trained
        on so many of each domain's calibration windows.
        """
        builder = self.builder(kind, top_k, router, route)
        self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.work, prefix=".composite.") as folder:
            builder.assemble(Path(folder), builder.shared_tensors, None)
            composite = open_composite(folder)
        if route is None:
            return Made(composite=composite, seconds=0.0)
        data = {
            name: windows.select(slice(self.fit_windows))
            for name, windows in builder.calibration.items()
        }
        sums = self._read(builder.recipe, composite, data)
        report = route_model(
            composite,
            data,
            builder.recipe.route,
            batch_size=self.recipe.batch_size,
            seed=self.recipe.seed,
            statistics=sums and sums.statistics,
            progress=self.progress,
        )
        parts = [part for part in (sums, report.fitted, report.training) if part is not None]
        return Made(composite=composite, seconds=sum(part.seconds for part in parts))

    def _read(
        self, recipe: Recipe, composite: Composite, data: Mapping[str, Windows]
    ) -> Sums | None:
        """What gates like these saw, read now if no router before has; None if not to be shared."""
        if not self.sharing or recipe.route.init not in SUMMED:
            return None
        gates, settings = linear_gates(composite.model), FitSettings()
        seen = [(gate.name, gate.module.get_parameter("weight").shape[1]) for gate in gates]
        context = getattr(getattr(recipe.compose, "router", None), "context", None)
        key = digest([recipe.compose.kind, seen, context, recipe.route.stitch])
        if key not in self._sums:
            started = time.perf_counter()
            statistics = collect(
                composite.model,
                gates,
                hold_back(data)[0],
                composite.own_expert(data),
                stitch=recipe.route.stitch,
                tokens=settings.tokens,
                sample=settings.logistic_tokens,
                seed=recipe.seed,
                batch_size=recipe.batch_size,
                progress=self.progress,
            )
            self._sums[key] = Sums(statistics=statistics, seconds=time.perf_counter() - started)
        return self._sums[key]

    def builder(
        self, kind: Kind, top_k: int, router: Settings | None = None, route: Settings | None = None
    ) -> RoutingBuilder:
        """What builds that composite."""
        values = self.recipe.model_dump()
        values["compose"] = {**KINDS[kind], "top_k": top_k}
        if router is not None:
            values["compose"]["router"] = dict(router)
        values["prune"]["sites"] = SITES[kind]
        values["route"] = {"train_steps": 0, **(route or {})}
        made = builder_of(Recipe.model_validate(values), Stages(self.work), self.progress)
        assert isinstance(made, RoutingBuilder)
        return made

    def of_mergekit(self, mode: str, top_k: int) -> Made:
        """The mixture with the gates that mergekit-moe writes for these dense finetunes."""
        made = self.make("mixture", top_k)
        with torch.no_grad():
            for gate, weight_ED in zip(
                find_gates(made.composite.model), self._mergekit_gates(mode), strict=True
            ):
                gate.module.get_parameter("weight").copy_(weight_ED)
        return made

    def _mergekit_gates(self, mode: str) -> list[Tensor]:
        """Run mergekit-moe and take its gates, one (E, D) a layer."""
        values = {
            "base_model": self.recipe.base,
            "gate_mode": mode,
            "dtype": "float32",
            "architecture": "mixtral",
            "experts": [
                {"source_model": expert.model, "positive_prompts": self.prompts[expert.name]}
                for expert in self.recipe.experts
            ],
        }
        with (
            tempfile.TemporaryDirectory(dir=self.work, prefix=".mergekit.") as folder,
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            torch.manual_seed(self.recipe.seed)
            config = MoEMergeConfig.model_validate(values)
            mergekit_moe(config, folder, MergeOptions(), device="cpu")
            found = Checkpoint(Path(folder))
            layers = range(found.config.num_hidden_layers)
            names = [f"model.layers.{layer}.mlp.gate.weight" for layer in layers]
            return [found[name].clone() for name in names]

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """The starts of as many calibration windows of every expert."""
        builder = self.builder("mixture", 1)
        return {
            name: builder.tokenizer.batch_decode(
                windows.ids_WC[:PROMPTS, :PROMPT_TOKENS], skip_special_tokens=True
            )
            for name, windows in builder.calibration.items()
        }

    def split(self, name: str) -> "Workshop":
        """The same with one expert twice, each pruned and routed on half of its documents."""
        experts: list[dict[str, Any]] = []
        for expert in self.recipe.experts:
            if expert.name != name:
                experts.append(expert.model_dump())
                continue
            documents = list(expert.domain.documents())
            for number, letter in enumerate("ab"):
                half = documents[number::2]
                path = self.work / f"{name}-{letter}-{digest(half)}.jsonl"
                write_documents(path, half)
                domain = {"calibration": str(path), "heldout": expert.domain.heldout}
                named = {"name": f"{name}_{letter}", "model": expert.model}
                experts.append({**named, "domain": domain})
        recipe = Recipe.model_validate({**self.recipe.model_dump(), "experts": experts})
        return Workshop(recipe, self.work, self.fit_windows, self.sharing, self.progress)
