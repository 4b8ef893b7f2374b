"""Two processes give what one gives, sharded or not, and one goes on where two were killed."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moiety.errors import InputError
from moiety.routers import TrainReport
from moiety.routers.masters import Masters
from moiety.routers.passes import linear_gates
from moiety.routers.sharding import shard


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    """The module `runs.py`."""
    spec = importlib.util.spec_from_file_location("runs", Path(__file__).with_name("runs.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind, the second of their runs of `language` killed."""
    out = tmp_path_factory.mktemp("together")
    worker = Path(__file__).with_name("train_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, str(worker), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr
    return out


def _check_same(model: nn.Module, report: TrainReport, expected: Path) -> None:
    history = json.loads(expected.with_suffix(".json").read_text())
    assert len(history) == len(report.history) == 3
    for two, one in zip(history, report.history, strict=True):
        for name, value in one.to_json().items():
            assert two[name] == pytest.approx(value, abs=1e-5), name
    tensors = load_file(expected.with_suffix(".safetensors"))
    found = Masters(linear_gates(model)).snapshot()
    assert set(found) == set(tensors)
    for name, tensor in found.items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["language", "distill", "domain", "regret", "bias"])
def test_two_processes_give_the_result_of_one(
    toys: ModuleType, runs: ModuleType, together: Path, name: str
) -> None:
    model = runs.model_of(toys, name)
    report = runs.run(toys, model, runs.SETTINGS[name])
    _check_same(model, report, together / name)
    if (together / f"sharded-{name}.json").exists():
        _check_same(model, report, together / f"sharded-{name}")
    assert list((together / "log" / "moiety-gates").glob("events.*"))


def test_a_sharded_run_can_be_read_unsharded(
    toys: ModuleType, runs: ModuleType, together: Path
) -> None:
    folder = together / "sharded-regret"
    settings = dataclasses.replace(runs.SETTINGS["regret"], checkpoint=folder)
    model = runs.model_of(toys, "regret")
    _check_same(model, runs.run(toys, model, settings), folder)


def test_one_process_goes_on_where_two_were_killed(
    toys: ModuleType, runs: ModuleType, together: Path
) -> None:
    state = json.loads((together / "state" / "state.json").read_text())
    assert state["step"] == 3 and len(state["history"]) == 2
    settings = dataclasses.replace(runs.SETTINGS["language"], checkpoint=together / "state")
    model = runs.model_of(toys, "language")
    report = runs.run(toys, model, settings)
    assert [one.to_json() for one in report.history[:2]] == state["history"]
    _check_same(model, report, together / "language")


def test_sharding_needs_processes(toys: ModuleType) -> None:
    with pytest.raises(InputError, match="process group"):
        shard(toys.mixtral())
