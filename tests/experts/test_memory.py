"""Freed memory goes back to the system, and a matrix is stored before the next one is pruned."""

import ctypes
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from moiety.experts import PruneSettings, blocks, prune
from moiety.experts.matrix import Matrix
from moiety.experts.memory import release_freed_memory

MIB = 1 << 20
STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes of this process's own pages in memory."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(
    not STATUS.is_file() or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc"
)
def test_freed_tensors_leave_the_process() -> None:
    del_me = torch.ones(24 * MIB, dtype=torch.uint8)
    del del_me
    tensors = [torch.ones(4 * MIB, dtype=torch.uint8) for _ in range(32)]
    last = torch.ones(1 * MIB, dtype=torch.uint8)
    full = resident()
    tensors.clear()
    kept = full - resident()
    release_freed_memory()
    assert full - resident() > 120 * MIB > kept
    assert last.all()


def test_matrices_are_stored_one_by_one(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Matrix]] = []

    class Watched(Matrix):
        def __post_init__(self) -> None:
            super().__post_init__()
            assert all(other() is None for other in made)
            made.append(weakref.ref(self))

    monkeypatch.setattr(blocks, "Matrix", Watched)
    settings = PruneSettings(context_length=32, windows=2, sites="all", refit_steps=1)
    text = world.texts["letters"]["calibration"]
    prune(world.finetunes["letters"], tmp_path / "out", text, settings)
    assert len(made) == 2 * 7
