"""What pruning costs at home and away: every method, site and pattern on the demo's finetunes.

    python -m experiments.pruning --out experiments/pruning.json [--only table,values,...]

Each cell prunes the four finetunes, each on its own domain's calibration text, and measures the
loss of the result on every domain's held-out text. Cells already in the file are kept.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from moiety.console import ConsoleProgress
from moiety.demo.models import DOMAINS, FULL, QUICK, DemoModels, prepare
from moiety.experts import BlockRecovery, PruneSettings, prune, prune_many
from moiety.experts.delta import TaskVector
from moiety.experts.many import Finetune
from moiety.experts.unpack import dense_view
from moiety.files import read_json, write_json
from moiety.scoring import score
from moiety.text import Windows, read_documents, token_windows

HELD_OUT_WINDOWS = 32
PATTERNS, SITES = ("2:4", "4:8", "0.5"), ("ffn", "all")
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "refit_steps": 0},
    "wanda": {"method": "wanda", "refit_steps": 0},
    "ria": {"method": "ria", "refit_steps": 0},
    "sparsegpt": {"method": "sparsegpt", "refit_steps": 0},
    "sparsegpt + refit": {"method": "sparsegpt"},
    "alps + refit": {"method": "alps"},
    "sparsegpt + refit + recovery": {"method": "sparsegpt", "recovery": BlockRecovery()},
    "alps + refit + recovery": {"method": "alps", "recovery": BlockRecovery()},
}
DENSITIES = ("0.7", "0.6", "0.5", "0.4", "0.3", "0.2", "0.1")


@dataclass(frozen=True)
class Cell:
    """One setting of all four finetunes."""

    group: str
    name: str
    settings: Mapping[str, Any]
    base: bool = False
    shared: bool = False


def cells() -> Iterator[Cell]:
    """Everything that is measured, in order."""
    for sites in SITES:
        for pattern in PATTERNS:
            for name, how in METHODS.items():
                yield Cell("table", name, {**how, "sites": sites, "pattern": pattern})
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
        yield Cell("schedule", f"{len(schedule) + 1} rounds", settings)
    for density in ("0.25", "0.5"):
        settings = {"sites": "all", "pattern": density}
        yield Cell("task vector", "the finetune's weights", settings)
        yield Cell("task vector", "the task vector, base dense", settings, base=True)
    settings = {"sites": "all", "pattern": "2:4"}
    yield Cell("shared mask", "a mask for each finetune", settings)
    yield Cell("shared mask", "one mask for all", settings, shared=True)


@dataclass
class Lab:
    """The demo's models and text, and a dense model to put weights into."""

    models: DemoModels
    context: int
    windows: dict[str, Windows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.models.base)
        for domain in DOMAINS:
            documents = read_documents(self.models.corpora / domain / "heldout.jsonl")
            self.windows[domain] = token_windows(
                tokenizer, documents, self.context, HELD_OUT_WINDOWS
            )

    def losses(self, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Nats per token of each domain's held-out text."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.models.base, dtype=torch.float32
        )
        state = model.state_dict()
        for name, tensor in weights.items():
            state[name].copy_(tensor)
        return {domain: score(model, text).loss for domain, text in self.windows.items()}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Prune and measure all finetunes."""
        settings = PruneSettings(
            **{"context_length": self.context, "windows": 128, **cell.settings}
        )
        folder = Path(tempfile.mkdtemp(prefix="moiety-pruning-"))
        try:
            reports = self._prune(cell, settings, folder)
            losses = {d: self.losses(_weights(folder / d, cell)) for d in DOMAINS}
        finally:
            shutil.rmtree(folder)
        return {
            "group": cell.group,
            "name": cell.name,
            "settings": {**cell.settings, "recovery": settings.recovery is not None},
            "losses": losses,
            "error": statistics.mean(list(r.errors.values())[-1] for r in reports),
            "bytes": sum(report.packed_bytes for report in reports),
            "dense_bytes": sum(report.dense_bytes for report in reports),
            "seconds": sum(report.seconds for report in reports),
        }

    def _prune(self, cell: Cell, settings: PruneSettings, folder: Path) -> list[Any]:
        text = {d: self.models.corpora / d / "calibration.jsonl" for d in DOMAINS}
        if cell.shared:
            tunes = [
                Finetune(name=d, model=self.models.finetunes[d], data=text[d]) for d in DOMAINS
            ]
            return [*prune_many(tunes, folder, settings, shared_mask=self.models.base).values()]
        base = self.models.base if cell.base else None
        return [
            prune(self.models.finetunes[d], folder / d, text[d], settings, base=base)
            for d in DOMAINS
        ]


def _weights(folder: Path, cell: Cell) -> Mapping[str, torch.Tensor]:
    return dict(TaskVector(folder).tensors()) if cell.base else dense_view(folder)


def controls(lab: Lab) -> dict[str, Any]:
    """Losses of the base and the dense finetunes."""
    finetunes = {d: lab.losses(dense_view(lab.models.finetunes[d])) for d in DOMAINS}
    return {"base": lab.losses({}), "dense": finetunes}


def main() -> None:
    """Measure what is missing and write it down after every cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("experiments/pruning.json"))
    parser.add_argument("--only", help="groups, comma-separated")
    parser.add_argument("--quick", action="store_true", help="the demo's quick models")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    size = QUICK if arguments.quick else FULL
    progress = ConsoleProgress()
    lab = Lab(prepare(size, seed=arguments.seed, progress=progress), size.context_length)
    results = read_json(arguments.out) if arguments.out.is_file() else {}
    results.setdefault("cells", {})
    results |= {
        "seed": arguments.seed,
        "context_length": lab.context,
        "held_out_windows": HELD_OUT_WINDOWS,
        "torch": torch.__version__,
    }
    if "controls" not in results:
        results["controls"] = controls(lab)
    wanted = [c for c in cells() if not arguments.only or c.group in arguments.only.split(",")]
    for cell in progress.track(wanted, "cells", len(wanted)):
        key = " | ".join(
            [cell.group, cell.name, *(f"{k}={v}" for k, v in _plain(cell.settings).items())]
        )
        if key not in results["cells"]:
            results["cells"][key] = lab.run(cell) | {"settings": _plain(cell.settings)}
            write_json(arguments.out, results)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: asdict(value) if isinstance(value, BlockRecovery) else value
        for name, value in settings.items()
    }


if __name__ == "__main__":
    main()
