"""Every control of a build on held-out text: the models it came from, merges, other routers."""

import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moiety.analysis.evaluate import (
    Problem,
    Scores,
    as_tables,
    device_name,
    domain_scores,
    exact_match,
    model_bytes,
    read_problems,
    router_scores,
    speed,
)
from moiety.compose.composite import Composite, open_composite
from moiety.compose.ensemble import EnsembleForCausalLM
from moiety.compose.kinds import builder_of
from moiety.compose.opening import open_any
from moiety.compose.recipe import Recipe
from moiety.compose.shared import WEIGHTS, Candidate, replace_shared
from moiety.compose.stages import Stages
from moiety.errors import InputError
from moiety.experts.checkpoint import digest_of_model
from moiety.experts.preflight import load_tokenizer
from moiety.files import digest, read_json, write_json
from moiety.progress import SILENT, Progress
from moiety.routers import find_gates, forced, one_hot
from moiety.text import Windows, read_documents, token_windows

TUNING_WINDOWS = 16


def evaluate_build(
    recipe: Recipe, composite: Path, work: Path, progress: Progress = SILENT
) -> dict[str, Any]:
    """Measure a built composite and all its controls; kept as the stage `evaluate` in `work`.

    Rows of `loss` and `bits_per_byte` (by domain): `base`, `soup`, `task_arithmetic` (its weight
    chosen on calibration text) and, on its own domain, each `finetune` and sparse `expert`; the
    composite with dense experts (`composite_dense`), as it is (`composite`) and under the
    controls of `router_scores`. Raises InputError when a domain has no held-out text.
    """
    stages = Stages(work, progress)
    controls = Controls(recipe, composite, work, progress)
    problems = {name: str(path) for name, path in recipe.evaluate.problems.items()}
    inputs = {
        "composite": digest_of_model(composite),
        "heldout": {name: len(windows) for name, windows in controls.heldout.items()},
        "models": controls.builder.key,
        "problems": problems,
        "evaluate": recipe.evaluate.model_dump(),
    }

    def make(scratch: Path) -> None:
        write_json(scratch / "results.json", controls.results())

    results = read_json(stages.run("evaluate", inputs, make) / "results.json")
    return {**results, "seconds": {"evaluate": stages.seconds["evaluate"]}}


def evaluate_routes(
    recipe: Recipe, composite: Path, work: Path, progress: Progress = SILENT
) -> dict[str, Any]:
    """The rows of `router_scores` alone, of one more composite of the same finetunes.

    Kept as the stage `routes` in `work`; `loss` and `bits_per_byte` by row and domain.
    """
    heldout = heldout_windows(recipe, load_tokenizer(Path(recipe.base)))

    def make(scratch: Path) -> None:
        rows = router_scores(
            open_composite(composite),
            heldout,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            progress=progress,
        )
        write_json(scratch / "rows.json", as_tables(rows))

    inputs = {
        "composite": digest_of_model(composite),
        "heldout": {name: digest(windows.ids_WC.tolist()) for name, windows in heldout.items()},
        "seed": recipe.seed,
    }
    return read_json(Stages(work, progress).run("routes", inputs, make) / "rows.json")


def heldout_windows(recipe: Recipe, tokenizer: Any) -> dict[str, Windows]:
    """Held-out windows of every domain; InputError names an expert without held-out text."""
    windows: dict[str, Windows] = {}
    for expert in recipe.experts:
        if expert.domain.heldout is None:
            raise InputError(
                f"expected held-out text for expert {expert.name} to measure on; "
                "give domain.heldout in the recipe"
            )
        windows[expert.name] = token_windows(
            tokenizer,
            read_documents(expert.domain.heldout),
            recipe.context_length,
            recipe.evaluate.windows,
        )
    return windows


class Controls:
    """The rows of the controls' table, one group after another."""

    def __init__(
        self, recipe: Recipe, composite: Path, work: Path, progress: Progress = SILENT
    ) -> None:
        self.recipe = recipe
        self.composite = composite
        self.work = work
        self.progress = progress
        self.builder = builder_of(recipe, Stages(work))
        self.heldout = heldout_windows(recipe, self.builder.tokenizer)
        self.problems = {
            name: read_problems(path) for name, path in recipe.evaluate.problems.items()
        }
        self.rows: dict[str, Scores] = {}
        self.accuracy: dict[str, dict[str, float]] = {name: {} for name in self.problems}
        self.speeds: dict[str, dict[str, float]] = {}
        self.sizes: dict[str, int] = {}
        self.merge_weight = 0.0

    def results(self) -> dict[str, Any]:
        """Measure everything; the layout is that of `results.json`."""
        groups = (self._merges, self._own_models, self._dense_composite, self._sparse_composite)
        for group in self.progress.track(groups, "measure models and controls", len(groups)):
            group()
        return {
            "context_length": self.recipe.context_length,
            "seed": self.recipe.seed,
            "domains": self.recipe.names,
            **as_tables(self.rows),
            "accuracy": self.accuracy,
            "bytes": self.sizes,
            "tokens_per_second": self.speeds,
            "choices": {
                **_told(self.builder.facts()),
                "task_arithmetic_weight": self.merge_weight,
            },
            "device": device_name(),
        }

    def _merges(self) -> None:
        base, finetunes = self.builder.base, self.builder.finetunes
        model = open_any(base.folder).model
        self._measure("base", model)
        self.speeds["base"] = speed(model)
        self.merge_weight = self._best_weight(model)
        replace_shared(model, Candidate("soup").tensors(base, finetunes, self.builder.is_known))
        self._measure("soup", model)
        self._add_task_vectors(model, self.merge_weight)
        self._measure("task_arithmetic", model)

    def _best_weight(self, model: PreTrainedModel) -> float:
        """The task-arithmetic weight with the least loss on calibration text."""
        data = {n: w.select(slice(TUNING_WINDOWS)) for n, w in self.builder.calibration.items()}
        losses: dict[float, float] = {}
        for weight in WEIGHTS:
            self._add_task_vectors(model, weight)
            scores = domain_scores(model, data, self.recipe.batch_size)
            losses[weight] = sum(score.loss for score in scores.values())
        return min(losses, key=lambda weight: losses[weight])

    def _add_task_vectors(self, model: PreTrainedModel, weight: float) -> None:
        base, finetunes = self.builder.base, self.builder.finetunes
        candidate = Candidate("task_arithmetic", weight)
        replace_shared(model, candidate.tensors(base, finetunes, self.builder.is_known))

    def _own_models(self) -> None:
        """Each finetune and each sparse expert, if there are any, on its own domain."""
        for name in self.recipe.names:
            own = {name: self.heldout[name]}
            self._measure("finetune", open_any(self.builder.finetunes[name].folder).model, own)
            if name in self.builder.experts:
                self._measure("expert", self.builder.open_expert(name), own)

    def _dense_composite(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.work, prefix=".dense.") as folder:
            self.builder.write(Path(folder), dense=True)
            dense = open_any(folder)
        self._measure("composite_dense", dense.model)
        self.speeds["composite_dense"] = speed(dense.model)

    def _sparse_composite(self) -> None:
        composite = open_any(self.composite)
        if composite.experts:
            self.rows.update(
                router_scores(
                    composite,
                    self.heldout,
                    seed=self.recipe.seed,
                    batch_size=self.recipe.batch_size,
                    progress=self.progress,
                )
            )
            self._answer("composite", composite.model, self.problems)
            for name in set(self.problems) & set(composite.experts):
                with _oracle(composite, name):
                    self._answer("oracle", composite.model, {name: self.problems[name]})
        else:
            self._measure("composite", composite.model)
        self.speeds["composite"] = speed(composite.model)
        self.sizes = model_bytes(composite.model)

    def _measure(
        self, row: str, model: PreTrainedModel, data: Mapping[str, Windows] | None = None
    ) -> None:
        scores = domain_scores(model, data or self.heldout, self.recipe.batch_size)
        self.rows.setdefault(row, {}).update(scores)
        asked = {n: p for n, p in self.problems.items() if data is None or n in data}
        self._answer(row, model, asked)

    def _answer(
        self, row: str, model: PreTrainedModel, problems: Mapping[str, list[Problem]]
    ) -> None:
        for name, problem_set in problems.items():
            self.accuracy[name][row] = exact_match(model, self.builder.tokenizer, problem_set)


def _told(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that are single values."""
    return {name: value for name, value in facts.items() if not isinstance(value, dict | list)}


def _oracle(composite: Composite, domain: str) -> AbstractContextManager[None]:
    """Route every token to the expert of `domain`."""
    if isinstance(composite.model, EnsembleForCausalLM):
        return composite.model.forced(domain)
    return forced(find_gates(composite.model), one_hot(composite.experts.index(domain)))
