"""Trains a tiny model under torchrun and saves what rank 0 has: `train_worker.py OUT`."""

import json
import sys
from pathlib import Path

import torch
import toys
from safetensors.torch import save_file

from moiety.routers import TrainSettings, train
from moiety.routers.masters import gate_weights
from moiety.routers.passes import linear_gates

SETTINGS = TrainSettings(
    steps=6, eval_every=3, windows_per_domain=2, batch_size=2, balance_weight=0.1, z_weight=0.01
)


def main(out: Path) -> None:
    """Train, then save the gates and the losses."""
    torch.set_num_threads(1)
    model = toys.mixtral()
    report = train(model, toys.domains(5), toys.domains(3, seed=1), toys.OWN, SETTINGS)
    if torch.distributed.get_rank() == 0:
        weights = {name: one.detach() for name, one in gate_weights(linear_gates(model)).items()}
        save_file(weights, out / "gates.safetensors")
        losses = [evaluation.loss for evaluation in report.history]
        (out / "losses.json").write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
