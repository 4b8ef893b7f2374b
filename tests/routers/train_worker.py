"""Trains tiny models under torchrun and saves what rank 0 has: `train_worker.py OUT`.

The last run is killed after its second evaluation, and with it this program.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import runs
import torch
import toys
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from moiety.progress import Silent
from moiety.routers import TrainReport
from moiety.routers.masters import Masters, gate_weights
from moiety.routers.passes import linear_gates
from moiety.routers.sharding import shard


class Killing(Silent):
    """A listener that ends the process at once when it hears its second note."""

    def __init__(self) -> None:
        self.notes = 0

    def note(self, message: str) -> None:
        """Hear a note."""
        self.notes += 1
        if self.notes == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def keep(model: nn.Module, report: TrainReport, place: Path) -> None:
    """Write the gates and the evaluations of a run, on rank 0."""
    if torch.distributed.get_rank() == 0:
        save_file(Masters(linear_gates(model)).snapshot(), place.with_suffix(".safetensors"))
        history = [evaluation.to_json() for evaluation in report.history]
        place.with_suffix(".json").write_text(json.dumps(history))


def train_sharded(out: Path) -> None:
    """Train with the frozen weights spread over the processes."""
    for name in ("language", "regret"):
        model = runs.model_of(toys, name)
        shard(model)
        settings = dataclasses.replace(runs.SETTINGS[name], checkpoint=out / f"sharded-{name}")
        keep(model, runs.run(toys, model, settings), out / f"sharded-{name}")
        gates = gate_weights(linear_gates(model))
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                assert 2 * parameter.to_local().numel() == parameter.numel(), name
            else:
                assert name in gates, name
            assert parameter.requires_grad, name


def main(out: Path) -> None:
    """Train in every way, saving the gates and the evaluations; then the run that is killed."""
    torch.set_num_threads(1)
    for name, settings in runs.SETTINGS.items():
        model = runs.model_of(toys, name)
        logged = dataclasses.replace(settings, trackers=("tensorboard",), log_dir=out / "log")
        keep(model, runs.run(toys, model, logged), out / name)
    train_sharded(out)
    stopped = dataclasses.replace(runs.SETTINGS["language"], checkpoint=out / "state")
    runs.run(toys, runs.model_of(toys, "language"), stopped, Killing())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
