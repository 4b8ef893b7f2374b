"""A pruning run that was killed goes on and ends with the same bytes as one that was not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moiety.errors import OutputError
from moiety.experts import PruneSettings, prune

SETTINGS = {"sites": "all", "context_length": 32, "windows": 8, "batch_size": 3}

CHILD = """
import json, os, signal, sys
from moiety.experts import BlockRecovery, PruneSettings, prune
from moiety.progress import Silent

class Deadly(Silent):
    left = int(sys.argv[5])
    def track(self, items, description, total=None):
        for item in items:
            yield item
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

model, out, text = sys.argv[1:4]
settings = json.loads(sys.argv[4])
settings["schedule"] = tuple(settings.get("schedule", ()))
if "recovery" in settings:
    settings["recovery"] = BlockRecovery(**settings["recovery"])
prune(model, out, text, PruneSettings(**settings), Deadly())
"""


def run_child(world: Any, out: Path, kill_after: int, **settings: Any) -> int:
    """Prune in a process that kills itself after so many steps of progress (0: never)."""
    arguments = [
        str(world.finetunes["letters"]),
        str(out),
        str(world.texts["letters"]["calibration"]),
        json.dumps({**SETTINGS, **settings}),
        str(kill_after),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(
        command, env=environment, cwd=out.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run_child(world, out, 0) == 0
    return contents(out)


@pytest.mark.parametrize("moment", [7, 8, 12])
def test_killed_and_started_again_gives_the_same_bytes(
    world: Any, tmp_path: Path, whole: dict[str, str], moment: int
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.pruning"
    assert run_child(world, out, moment) == -signal.SIGKILL
    assert not out.exists()
    finished = len(list(work.rglob("block-*.json")))
    assert finished == (moment >= 8)
    assert run_child(world, out, 0) == 0
    assert contents(out) == whole
    assert not work.exists()


def test_recovery_goes_on_too(world: Any, tmp_path: Path) -> None:
    settings = {"recovery": {"epochs": 2, "target": "model"}}
    assert run_child(world, tmp_path / "whole", 0, **settings) == 0
    out = tmp_path / "out"
    assert run_child(world, out, 9, **settings) == -signal.SIGKILL
    assert len(list(tmp_path.rglob("block-*.json"))) == 1
    assert run_child(world, out, 0, **settings) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_what_is_finished_is_not_done_again(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_child(world, out, 9)
    model, text = world.finetunes["letters"], world.texts["letters"]["calibration"]
    report = prune(model, out, text, PruneSettings(**SETTINGS))
    assert report.blocks_resumed == 1
    assert len(report.matrices) == 14


def test_other_settings_start_afresh(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_child(world, out, 9)
    model, text = world.finetunes["letters"], world.texts["letters"]["calibration"]
    report = prune(model, out, text, PruneSettings(**{**SETTINGS, "pattern": "1:4"}))
    assert report.blocks_resumed == 0
    assert {matrix.pattern for matrix in report.matrices} == {"1:4"}


def test_rounds_and_owl_go_on_too(world: Any, tmp_path: Path) -> None:
    settings = {"pattern": "0.4", "schedule": ["0.7"], "allocation": "owl"}
    assert run_child(world, tmp_path / "whole", 0, **settings) == 0
    for moment in (5, 25):
        out = tmp_path / f"out{moment}"
        assert run_child(world, out, moment, **settings) == -signal.SIGKILL
        assert run_child(world, out, 0, **settings) == 0
        assert contents(out) == contents(tmp_path / "whole")
        assert not out.with_name(f"{out.name}.pruning").exists()


def test_a_damaged_block_file_is_named_and_made_again(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_child(world, out, 9)
    (file,) = tmp_path.rglob("block-*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    model, text = world.finetunes["letters"], world.texts["letters"]["calibration"]
    with pytest.raises(OutputError, match="block 0"):
        prune(model, out, text, PruneSettings(**SETTINGS))
    assert prune(model, out, text, PruneSettings(**SETTINGS)).blocks_resumed == 0
