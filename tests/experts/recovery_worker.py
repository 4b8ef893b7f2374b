"""Recovers a model in a process of its own: `recovery_worker.py SPARSE TEACHER TEXT OUT CHECKPOINT`.

With a sixth argument N the process kills itself once N checkpoints have been written.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import recovery_toys as toys
import torch

from moiety.experts.recovery import checkpoint, recover
from moiety.experts.recovery.checkpoint import State


def kill_after(saves: int) -> None:
    """Make this process kill itself after its `saves`-th checkpoint."""
    original, done = checkpoint.save, []

    def save(folder: Path, run: str, state: State) -> None:
        original(folder, run, state)
        done.append(state.step)
        if len(done) == saves:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = save


def main(sparse: str, teacher: str, text: str, out: str, folder: str, *saves: str) -> None:
    """Recover; print the losses."""
    torch.set_num_threads(1)
    if saves:
        kill_after(int(saves[0]))
    settings = dataclasses.replace(toys.DISTILL, checkpoint=Path(folder))
    report = recover(sparse, teacher, text, out, "distill", settings)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps([evaluation.loss for evaluation in report.history]))  # noqa: T201
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
