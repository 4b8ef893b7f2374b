"""What pruning costs at home and away: every method, site and pattern on a recipe's finetunes.

    moiety demo
    python -m experiments.pruning moiety-demo/recipe.yaml [--only table,values,...] [--match TEXT]

Each cell prunes all finetunes of the recipe, each on its own domain's calibration text, and
measures the loss of the result on every domain's held-out text. Cells already in the file are
kept; `--part 1/2` measures every second one, to share the work among processes. `--device cuda`
does it all on a GPU.
"""

import argparse
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from experiments.results import started
from moiety.compose import Recipe
from moiety.console import ConsoleProgress
from moiety.errors import InputError
from moiety.experts import (
    BlockRecovery,
    Finetune,
    PruneReport,
    PruneSettings,
    prune_many,
    recover,
)
from moiety.experts.delta import TaskVector
from moiety.experts.recovery import DistillSettings
from moiety.experts.unpack import dense_view
from moiety.files import write_json
from moiety.scoring import score
from moiety.text import Windows, read_documents, token_windows

HELD_OUT_WINDOWS = 16
SAME_LOSS = 0.002
PATTERNS, SITES = ("2:4", "0.5", "4:8"), ("all", "ffn")
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "refit_steps": 0},
    "wanda": {"method": "wanda", "refit_steps": 0},
    "ria": {"method": "ria", "refit_steps": 0},
    "sparsegpt": {"method": "sparsegpt", "refit_steps": 0},
    "sparsegpt + refit": {"method": "sparsegpt"},
    "alps + refit": {"method": "alps"},
}
RECOVERED: dict[str, dict[str, Any]] = {
    "sparsegpt + refit + block recovery": {"method": "sparsegpt", "recovery": BlockRecovery()},
    "alps + refit + block recovery": {"method": "alps", "recovery": BlockRecovery()},
}
ALL_TEXT = 300
"""More windows of 256 tokens than any of the demo's calibration texts has."""
LONGER: dict[str, dict[str, Any]] = {
    f"{method} + refit + block recovery on all text": {
        "method": method,
        "recovery": BlockRecovery(),
        "windows": ALL_TEXT,
    }
    for method in ("sparsegpt", "alps")
}
DENSITIES = ("0.7", "0.6", "0.5", "0.4", "0.3", "0.2", "0.1")


@dataclass(frozen=True)
class Cell:
    """One setting of all four finetunes; `distil` steps of distillation after pruning.

    Distillation sees the finetune's logits and hidden states and no next-token loss, so that it
    cannot go past the finetune by learning more of the domain's text.
    """

    group: str
    name: str
    settings: Mapping[str, Any]
    base: bool = False
    shared: bool = False
    distil: int = 0


def cells() -> Iterator[Cell]:
    """Everything that is measured, in order."""
    for pattern in PATTERNS:
        for sites in SITES:
            for name, how in METHODS.items():
                yield Cell("table", name, {**how, "sites": sites, "pattern": pattern})
    for sites in SITES:
        for name, how in RECOVERED.items():
            yield Cell("recovery", name, {**how, "sites": sites, "pattern": "2:4"})
    for name, how in LONGER.items():
        yield Cell("recovery", name, {**how, "sites": "all", "pattern": "2:4"})
    settings = {"method": "sparsegpt", "sites": "all", "pattern": "2:4"}
    yield Cell("recovery", "sparsegpt + refit + distillation", settings, distil=100)
    for values in ("bf16", "int8", "int4"):
        for pattern in ("2:4", "0.5"):
            settings = {"sites": "all", "pattern": pattern, "values": values}
            yield Cell("values", f"{values} values", settings)
    for density in DENSITIES:
        for name, how in (
            ("sparsegpt + refit", {}),
            ("sparsegpt + refit, owl", {"allocation": "owl"}),
            ("magnitude", METHODS["magnitude"]),
        ):
            yield Cell("collapse", name, {**how, "sites": "all", "pattern": density})
    for schedule in ((), ("0.6", "0.45"), ("0.7", "0.6", "0.5", "0.4")):
        settings = {"sites": "all", "pattern": "0.3", "schedule": schedule}
        name = f"in {len(schedule) + 1} rounds" if schedule else "in one go"
        yield Cell("schedule", name, settings)
    for density in ("0.25", "0.5"):
        settings = {"sites": "all", "pattern": density}
        yield Cell("task vector", "the finetune's weights", settings)
        yield Cell("task vector", "the task vector, base dense", settings, base=True)
    settings = {"sites": "all", "pattern": "2:4"}
    yield Cell("shared mask", "a mask for each finetune", settings)
    yield Cell("shared mask", "one mask for all", settings, shared=True)


@dataclass
class Lab:
    """A recipe's models and text, `held_out` windows a domain of it to measure on."""

    recipe: Recipe
    held_out: int = HELD_OUT_WINDOWS
    device: str = "cpu"
    windows: dict[str, Windows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.recipe.base)
        for expert in self.recipe.experts:
            if expert.domain.heldout is None:
                raise InputError(f"expected held-out text for {expert.name}, but it has none")
            documents = read_documents(expert.domain.heldout)
            context = self.recipe.context_length
            self.windows[expert.name] = token_windows(tokenizer, documents, context, self.held_out)

    @property
    def finetunes(self) -> list[Finetune]:
        """Name, model and calibration text of each."""
        return [
            Finetune(name=expert.name, model=expert.model, data=list(expert.domain.documents()))
            for expert in self.recipe.experts
        ]

    def losses(self, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Nats per token of each domain's held-out text."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.recipe.base, dtype=torch.float32, device_map=self.device
        )
        state = model.state_dict()
        for name, tensor in weights.items():
            state[name].copy_(tensor)
        return {domain: score(model, text).loss for domain, text in self.windows.items()}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Prune and measure all finetunes."""
        settings = PruneSettings(
            **{
                "context_length": self.recipe.context_length,
                "windows": self.recipe.calibration_windows,
                "device": self.device,
                **cell.settings,
            }
        )
        folder = Path(tempfile.mkdtemp(prefix="moiety-pruning-"))
        try:
            start = time.perf_counter()
            reports = self._prune(cell, settings, folder)
            places = {
                tune.name: self._recovered(tune, folder, cell.distil) for tune in self.finetunes
            }
            seconds = time.perf_counter() - start
            losses = {n: self.losses(_weights(place, cell)) for n, place in places.items()}
        finally:
            shutil.rmtree(folder)
        return {
            "group": cell.group,
            "name": cell.name,
            "base": cell.base,
            "shared": cell.shared,
            "distil": cell.distil,
            "losses": losses,
            "error": statistics.mean(list(r.errors.values())[-1] for r in reports),
            "bytes": sum(report.packed_bytes for report in reports),
            "dense_bytes": sum(report.dense_bytes for report in reports),
            "seconds": seconds,
        }

    def _prune(self, cell: Cell, settings: PruneSettings, folder: Path) -> list[PruneReport]:
        base = self.recipe.base
        reports = prune_many(
            self.finetunes,
            folder,
            settings,
            base=base if cell.base else None,
            shared_mask=base if cell.shared else None,
        )
        return list(reports.values())

    def _recovered(self, tune: Finetune, folder: Path, steps: int) -> Path:
        """Where a finetune's result is, after so many steps of distillation."""
        if not steps:
            return folder / tune.name
        settings = DistillSettings(
            cross_entropy=0.0,
            steps=steps,
            windows=ALL_TEXT,
            context_length=self.recipe.context_length,
            seed=self.recipe.seed,
        )
        out = folder / f"{tune.name}-distilled"
        recover(folder / tune.name, tune.model, tune.data, out, "distill", settings)
        return out


def _weights(folder: Path, cell: Cell) -> Mapping[str, torch.Tensor]:
    return dict(TaskVector(folder).tensors()) if cell.base else dense_view(folder)


def controls(lab: Lab) -> dict[str, Any]:
    """Losses of the base and the dense finetunes."""
    dense = {tune.name: lab.losses(dense_view(tune.model)) for tune in lab.finetunes}
    return {"base": lab.losses({}), "dense": dense}


def check_same_models(lab: Lab, base: Mapping[str, float]) -> None:
    """Raise InputError unless the recipe's base and text are those that the file's controls are of.

    The demo's text is what the machine has, so another machine's models are others.
    """
    for domain, loss in lab.losses({}).items():
        if abs(loss - base.get(domain, math.inf)) > SAME_LOSS:
            raise InputError(
                f"expected the models and text of the results so far, but the base's loss on "
                f"{domain} is {loss:.4f} and theirs is {base.get(domain, math.nan):.4f}; "
                "choose another --out"
            )


def key_of(cell: Cell) -> str:
    """A cell's name in the file."""
    settings = (f"{name}={value}" for name, value in _plain(cell.settings).items())
    return " | ".join([cell.group, cell.name, *settings])


def main() -> None:
    """Measure what is missing and write it down after every cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, default=Path("experiments/pruning.json"))
    parser.add_argument("--only", help="groups, comma-separated")
    parser.add_argument("--match", help="only cells whose key holds one of these, comma-separated")
    parser.add_argument("--held-out", type=int, default=HELD_OUT_WINDOWS, help="windows a domain")
    parser.add_argument("--part", default="1/1", help="which part of how many")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    progress = ConsoleProgress()
    lab = Lab(Recipe.read(arguments.recipe), arguments.held_out, arguments.device)
    results = started(arguments.out, _measured_how(lab), lambda: controls(lab))
    check_same_models(lab, results["controls"]["base"])
    part, parts = map(int, arguments.part.split("/"))
    wanted = [cell for cell in cells() if _is_wanted(cell, arguments.only, arguments.match)]
    wanted = [cell for cell in wanted[part - 1 :: parts] if key_of(cell) not in results["cells"]]
    for cell in progress.track(wanted, "cells", len(wanted)):
        results["cells"][key_of(cell)] = lab.run(cell) | {"settings": _plain(cell.settings)}
        write_json(arguments.out, results)


def _measured_how(lab: Lab) -> dict[str, Any]:
    """What results of two runs must share to stand in one file."""
    return {
        "seed": lab.recipe.seed,
        "context_length": lab.recipe.context_length,
        "calibration_windows": lab.recipe.calibration_windows,
        "held_out_windows": lab.held_out,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if lab.device != "cpu" else "CPU",
    }


def _is_wanted(cell: Cell, groups: str | None, texts: str | None) -> bool:
    """Whether a cell is of one of the groups and its key holds one of the texts."""
    key = key_of(cell)
    in_groups = not groups or cell.group in groups.split(",")
    return in_groups and (not texts or any(text in key for text in texts.split(",")))


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: asdict(value) if isinstance(value, BlockRecovery) else value
        for name, value in settings.items()
    }


if __name__ == "__main__":
    main()
