"""One cell of the experiment: prune and merge in some order, choose a coefficient, measure.

O out features, I in features.
"""

import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.merging_sparse_experts.inputs import Inputs, Models
from moiety.compose import Recipe
from moiety.compose.merge import streamed
from moiety.compose.merge.properties import coefficients
from moiety.compose.merged.conflict import contest
from moiety.compose.merged.packed import write_dense
from moiety.compose.recipe import Merging
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.pattern import Pattern
from moiety.experts.prune import prune
from moiety.experts.unpack import dense_view
from moiety.progress import SILENT, Progress
from moiety.scoring import score
from moiety.text import Windows, read_documents, token_windows

HELD_OUT_WINDOWS = CHOICE_WINDOWS = 16
PATTERNS = ("2:4", "4:8", "0.5")
DENSE, MERGE_FIRST, CONFLICT = "dense merge", "merge, then prune", "conflict-aware deltas"
PRUNE_FIRST, SHARED, DELTAS = "prune, then merge", "shared mask", "sparse deltas"
ORDERS = (PRUNE_FIRST, MERGE_FIRST, SHARED, DELTAS, CONFLICT)
SEEDS = (0, 1, 2)
ROUNDING = 1e-6
"""Differences to the base below this share of its largest weight count as none."""


@dataclass(frozen=True)
class Method:
    """One of mergekit's methods, the parameter that is swept, and whether it draws at random."""

    name: str
    parameters: Mapping[str, float]
    swept: str | None = None
    values: tuple[float, ...] = ()
    random: bool = False

    def merging(self, value: float | None) -> Merging:
        """The method with its swept parameter set."""
        swept = {} if self.swept is None or value is None else {self.swept: value}
        return Merging(method=self.name, parameters={**self.parameters, **swept})


WEIGHTS, SCALES = (0.15, 0.25, 0.4, 0.6), (0.5, 1.0, 1.5, 2.0)
METHODS = (
    Method("linear", {"weight": 1.0}),
    Method("task_arithmetic", {}, "weight", WEIGHTS),
    Method("ties", {"weight": 1.0, "density": 0.5}, "lambda", SCALES),
    Method("dare_ties", {"density": 0.5}, "weight", WEIGHTS, random=True),
    Method("della", {"weight": 1.0, "density": 0.5}, "lambda", SCALES, random=True),
    Method("sce", {"select_topk": 0.5}),
    Method("model_stock", {}),
)
LINEAR = ("linear", "task_arithmetic")


@dataclass(frozen=True)
class Cell:
    """One method in one order under one pattern."""

    order: str
    method: Method
    pattern: str


def cells() -> Iterator[Cell]:
    """Everything that is measured, in order."""
    for method in METHODS:
        yield Cell(DENSE, method, "dense")
    for pattern in PATTERNS:
        for order in ORDERS:
            for method in METHODS:
                if order != CONFLICT or method.name in LINEAR:
                    yield Cell(order, method, pattern)


def key_of(cell: Cell) -> str:
    """A cell's name in the file."""
    return f"{cell.order} | {cell.method.name} | {cell.pattern}"


class Lab:
    """A recipe's models and text; pruned models are kept in `work`."""

    def __init__(
        self, recipe: Recipe, work: Path, held_out: int, progress: Progress = SILENT
    ) -> None:
        self.recipe, self.held_out = recipe, held_out
        self.inputs = Inputs(recipe, work, progress)
        self.held_out_text, self.choice_text = self._windows("heldout"), self._windows(None)

    def _windows(self, kind: str | None) -> dict[str, Windows]:
        tokenizer = AutoTokenizer.from_pretrained(self.recipe.base)
        found: dict[str, Windows] = {}
        for expert in self.recipe.experts:
            if expert.domain.heldout is None:
                raise InputError(f"expected held-out text for {expert.name}, but it has none")
            held_out = kind == "heldout"
            text = read_documents(expert.domain.heldout) if held_out else expert.domain.documents()
            limit = self.held_out if held_out else CHOICE_WINDOWS
            found[expert.name] = token_windows(tokenizer, text, self.recipe.context_length, limit)
        return found

    @cached_property
    def base(self) -> Checkpoint:
        """The dense base."""
        return Checkpoint(self.recipe.base)

    def losses(
        self, weights: Mapping[str, Tensor], text: Mapping[str, Windows] | None = None
    ) -> dict[str, float]:
        """Nats per token of each domain's text, held-out unless another is given."""
        model = AutoModelForCausalLM.from_pretrained(self.recipe.base, dtype=torch.float32)
        state = model.state_dict()
        for name, tensor in weights.items():
            state[name].copy_(tensor)
        text = self.held_out_text if text is None else text
        return {domain: score(model, windows).loss for domain, windows in text.items()}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Choose the coefficient, then measure the merge, for each seed if it draws at random."""
        models = self._models(cell)
        tried: dict[float, float] = {}
        whole = (1.0,) if cell.order == CONFLICT and cell.method.swept else ()
        for value in (*cell.method.values, *whole):
            weights = self._merged(cell, models, value, 0)
            tried[value] = statistics.mean(self.losses(weights, self.choice_text).values())
        best = min(tried, key=lambda value: tried[value]) if tried else None
        runs = []
        for seed in SEEDS if cell.method.random else SEEDS[:1]:
            weights = self._merged(cell, models, best, seed)
            if cell.order == MERGE_FIRST:
                weights = self._pruned(weights, cell.pattern)
            runs.append({"losses": self.losses(weights), **self._sparsity(cell, weights)})
        tried_text = {f"{value:g}": loss for value, loss in tried.items()}
        return {
            "order": cell.order,
            "method": cell.method.name,
            "pattern": cell.pattern,
            "swept": cell.method.swept,
            "value": best,
            "calibration_loss": tried_text,
            "runs": runs,
        }

    def _models(self, cell: Cell) -> Models:
        match cell.order:
            case "prune, then merge":
                return self.base, self.inputs.pruned(cell.pattern)
            case "shared mask":
                return self.inputs.masked(cell.pattern)
            case "sparse deltas":
                return self.base, self.inputs.deltas(cell.pattern)
        return self.base, self.inputs.finetunes

    def _merged(
        self, cell: Cell, models: Models, value: float | None, seed: int
    ) -> dict[str, Tensor]:
        base, finetunes = models
        merging = cell.method.merging(value)
        weights = dict(streamed(base, finetunes, merging, list(base), seed, exact=list(base)))
        if cell.order == CONFLICT:
            factors, pattern = coefficients(merging, list(finetunes)), Pattern.parse(cell.pattern)
            for module in self.inputs.modules:
                name = f"{module}.weight"
                base_OI = base[name].float()
                deltas = ((own, ft[name].float() - base_OI) for own, ft in finetunes.items())
                result = contest(deltas, factors, self.inputs.norms[module], pattern)
                weights[name] = base_OI + result.delta_OI
        return weights

    def _pruned(self, weights: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
        folder = Path(tempfile.mkdtemp(prefix="moiety-merging-"))
        try:
            (folder / "dense").mkdir()
            write_dense(folder / "dense", self.base, weights.items())
            text, settings = self.inputs.pooled_text, self.inputs.settings(pattern)
            prune(folder / "dense", folder / "pruned", text, settings)
            return {name: tensor.clone() for name, tensor in dense_view(folder / "pruned").items()}
        finally:
            shutil.rmtree(folder)

    def _sparsity(self, cell: Cell, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Share of zeros, and of the pattern's groups (or matrices) that follow it.

        Of the matrices that are pruned; of their differences to the base where those are.
        """
        pattern = Pattern.parse(cell.pattern if cell.pattern != "dense" else "2:4")
        zeros, followed = [], []
        for module in self.inputs.modules:
            weight_OI = weights[f"{module}.weight"].float()
            if cell.order in (DELTAS, CONFLICT):
                base_OI = self.base[f"{module}.weight"].float()
                delta_OI = weight_OI - base_OI
                weight_OI = delta_OI * (delta_OI.abs() > ROUNDING * base_OI.abs().max())
            zeros.append(float((weight_OI == 0).float().mean()))
            followed.append(_followed(weight_OI, pattern))
        return {"zeros": statistics.mean(zeros), "followed": statistics.mean(followed)}


def _followed(weight_OI: Tensor, pattern: Pattern) -> float:
    if not pattern.group:
        return float(pattern.holds(weight_OI))
    groups = (weight_OI != 0).view(-1, pattern.group).sum(-1)
    return float((groups <= pattern.kept).float().mean())


def controls(lab: Lab) -> dict[str, Any]:
    """Held-out losses of the base, the dense finetunes and the sparse ones of every pattern."""
    dense = {name: lab.losses(dict(ft)) for name, ft in lab.inputs.finetunes.items()}
    sparse = {
        pattern: {name: lab.losses(dict(ft)) for name, ft in lab.inputs.pruned(pattern).items()}
        for pattern in PATTERNS
    }
    return {"base": lab.losses({}), "dense": dense, "sparse": sparse}


def measured_how(lab: Lab) -> dict[str, Any]:
    """What results of two runs must share to stand in one file."""
    return {
        "seeds": list(SEEDS),
        "context_length": lab.recipe.context_length,
        "calibration_windows": lab.recipe.calibration_windows,
        "choice_windows": CHOICE_WINDOWS,
        "held_out_windows": lab.held_out,
        "methods": [{**asdict(method), "values": list(method.values)} for method in METHODS],
        "torch": torch.__version__,
    }
