"""Several finetunes at once: shared out over processes, and with one mask for all."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moiety.errors import InputError, OutputError
from moiety.experts import Finetune, Pattern, PruneSettings, prune_many
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.unpack import dense_view

SETTINGS = PruneSettings(sites="all", context_length=32, windows=8)
CLI = ["prune", "--context-length", "32", "--windows", "8", "--json"]


def finetunes(world: Any) -> list[Finetune]:
    return [
        Finetune(name=name, model=model, data=world.texts[name]["calibration"])
        for name, model in world.finetunes.items()
    ]


def launched(processes: int, world: Any, out: Path) -> None:
    """`moiety prune NAME=MODEL...` under torchrun (or alone), one thread a process."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    named = [f"{name}={model}" for name, model in world.finetunes.items()]
    texts = [f"--data={n}={t['calibration']}" for n, t in world.texts.items()]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        *("-m", "moiety", *CLI, *named, *texts, "--out", str(out)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=out.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_processes_share_the_finetunes_and_change_nothing(world: Any, tmp_path: Path) -> None:
    for processes in (1, 2):
        launched(processes, world, tmp_path / str(processes))
    for name in world.finetunes:
        for file in ("model.safetensors", "config.json", "pruning.json"):
            one, two = (tmp_path / str(count) / name / file for count in (1, 2))
            assert one.read_bytes() == two.read_bytes()
    assert {path.name for path in (tmp_path / "2").iterdir()} == set(world.finetunes)


@pytest.fixture(scope="module")
def shared(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "out"
    prune_many(finetunes(world), out, SETTINGS, shared_mask=world.base)
    return out


def test_with_one_mask_every_weighted_sum_is_still_sparse(world: Any, shared: Path) -> None:
    views = [dense_view(shared / name) for name in world.finetunes]
    mask = Checkpoint(shared / "shared-mask")
    for name, pattern in views[0].packed.items():
        assert pattern == Pattern(2, 4)
        mixed = sum(w * view[name].float() for w, view in zip((0.5, -1.0, 0.8), views, strict=True))
        assert isinstance(mixed, torch.Tensor) and pattern.holds(mixed)
        for view in views:
            assert torch.equal(view.raw[f"{name}_mask"], mask[f"{name}_mask"])


def test_values_are_fitted_to_the_shared_mask(world: Any, shared: Path) -> None:
    reports = prune_many(finetunes(world), shared, SETTINGS, shared_mask=world.base)
    for report in reports.values():
        assert list(report.errors) == ["mask", "refit", "stored"]
        assert report.errors["refit"] < report.errors["mask"]


def test_a_finished_folder_of_other_settings_is_not_taken(world: Any, shared: Path) -> None:
    other = PruneSettings(sites="all", context_length=32, windows=7)
    with pytest.raises(OutputError, match="made from another model, text or settings"):
        prune_many(finetunes(world), shared, other, shared_mask=world.base)


def test_names_must_differ(world: Any, tmp_path: Path) -> None:
    one = finetunes(world)[0]
    for names in ((one.name, one.name), (one.name, "shared-mask")):
        tunes = [Finetune(name=name, model=one.model, data=one.data) for name in names]
        with pytest.raises(InputError, match="different names"):
            prune_many(tunes, tmp_path / "out", SETTINGS)
