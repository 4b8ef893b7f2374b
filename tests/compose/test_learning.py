"""Learning a composite's gates: on several processes, stopped at any moment, with wrong input."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moiety.compose import build, open_composite, route
from moiety.compose.recipe import Route
from moiety.errors import InputError
from moiety.progress import Item, Silent
from tests.conftest import CONTEXT, World

TEXT: dict[str, Any] = {"windows": 16, "context_length": CONTEXT}
TRAINED = {"train_steps": 4, "objective": "regret", "learning_rate": 0.01}


@pytest.fixture(scope="module")
def mixture(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of two experts, which two processes can share out."""
    return built(world, tmp_path_factory.mktemp("mixture"), experts=2)


def built(world: World, folder: Path, experts: int) -> Path:
    """A mixture of the first of the world's experts, in a folder of its own in `folder`."""
    values = {
        "experts": world.recipe()["experts"][:experts],
        "prune": {"method": "magnitude", "refit_steps": 0},
        "compose": {"kind": "mixture", "shared": "base"},
        "route": {"train_steps": 0},
    }
    out = folder / f"of-{experts}"
    build(world.write_recipe(folder / "recipe.yaml", **values), out, work=folder / "work")
    return out


@pytest.fixture
def copy(mixture: Path, tmp_path: Path) -> Path:
    """A copy of the mixture that a test may change."""
    return Path(shutil.copytree(mixture, tmp_path / "copy"))


def texts(world: World, names: Iterable[str] = ("letters", "numbers")) -> dict[str, str]:
    return {name: str(world.texts[name]["calibration"]) for name in names}


def test_two_processes_learn_what_one_does(
    world: World, mixture: Path, copy: Path, tmp_path: Path
) -> None:
    """Whatever of the model each holds: all of it, a share of the weights, its own experts."""
    folders = {tmp_path / spread: spread for spread in ("none", "weights", "experts")}
    for folder in folders:
        shutil.copytree(mixture, folder)
    given = {"folders": {str(f): s for f, s in folders.items()}, "route": TRAINED}
    arguments = tmp_path / "arguments.json"
    arguments.write_text(json.dumps({**given, "data": texts(world), "text": TEXT}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(Path(__file__).with_name("route_worker.py")), str(arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    route(copy, texts(world), Route(**TRAINED), **TEXT)
    alone = load_file(copy / "model.safetensors")
    for folder in folders:
        together = load_file(folder / "model.safetensors")
        assert together.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, atol=1e-5, rtol=0)
        kept = json.loads((folder / "route.json").read_text())
        assert kept["training"]["trained"] == [
            "model.layers.0.mlp.gate.weight",
            "model.layers.1.mlp.gate.weight",
        ]


def test_one_process_has_nothing_to_share_out(world: World, copy: Path) -> None:
    with pytest.raises(InputError, match="several processes to spread experts over"):
        route(copy, texts(world), spread="experts")


class Stopping(Silent):
    """A listener that stops the run at its so-manieth note, and knows what was tracked."""

    def __init__(self, at: int | None = None) -> None:
        self.left = at
        self.tracked: list[str] = []

    def note(self, message: str) -> None:
        """Hear a note."""
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        """Hear of long work."""
        self.tracked.append(description)
        yield from items


def test_a_stopped_run_fits_once_and_goes_on(world: World, copy: Path, tmp_path: Path) -> None:
    """Stopped as it has fitted, and again while it trains: the files are those of an even run."""
    even = Path(shutil.copytree(copy, tmp_path / "even"))
    report = route(even, texts(world), Route(**TRAINED), **TEXT)
    before = load_file(copy / "model.safetensors")
    settings: dict[str, Any] = {**TEXT, "checkpoint": tmp_path / "state"}
    for at in (3, 1):
        with pytest.raises(KeyboardInterrupt):
            route(copy, texts(world), Route(**TRAINED), progress=Stopping(at), **settings)
        assert all(
            torch.equal(before[name], tensor)
            for name, tensor in load_file(copy / "model.safetensors").items()
        )
    heard = Stopping()
    resumed = route(copy, texts(world), Route(**TRAINED), progress=heard, **settings)
    assert heard.tracked == []
    assert resumed.training is not None and report.training is not None
    assert resumed.training.history == report.training.history
    found = load_file(copy / "model.safetensors")
    for name, tensor in load_file(even / "model.safetensors").items():
        assert torch.equal(found[name], tensor)


def test_an_added_experts_text_alone_is_read(world: World, copy: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**TEXT, "statistics": tmp_path / "statistics"}
    plain = Route(train_steps=0)
    route(copy, texts(world), plain, **settings)
    larger, heard = built(world, tmp_path, experts=3), Stopping()
    route(larger, texts(world, world.finetunes), plain, progress=heard, **settings)
    assert [what for what in heard.tracked if what.startswith("gate inputs")] == [
        "gate inputs of colours"
    ]
    with pytest.raises(InputError, match="statistics are kept for init ridge"):
        route(copy, texts(world), Route(init="random", train_steps=0), **settings)


def test_the_checkpoint_of_another_run_is_refused(world: World, copy: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**TEXT, "checkpoint": tmp_path / "state"}
    route(copy, texts(world), Route(train_steps=0), **settings)
    with pytest.raises(InputError, match="is of another run"):
        route(copy, texts(world), Route(train_steps=0, penalty=0.5), **settings)
    (tmp_path / "state" / "start.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="to be as it was written"):
        route(copy, texts(world), Route(train_steps=0), **settings)


def test_a_balance_that_gates_cannot_have_is_refused_before_the_fit(
    world: World, copy: Path
) -> None:
    heard = Stopping()
    with pytest.raises(InputError, match="selection bias for balance 'bias'"):
        route(copy, texts(world), Route(balance="bias"), progress=heard, **TEXT)
    assert heard.tracked == []


def test_text_that_cannot_teach_is_refused_and_changes_nothing(
    world: World, copy: Path, tmp_path: Path
) -> None:
    before = (copy / "model.safetensors").read_bytes()
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "one two three four five six seven eight nine ten"}\n')
    tiny = tmp_path / "tiny.jsonl"
    tiny.write_text('{"text": "1"}\n')
    for data, message in (
        (texts(world, ["letters"]), "at least two experts"),
        (texts(world, ["letters", "colours"]), "domains named like the experts"),
        (texts(world) | {"numbers": str(short)}, "at least 128 tokens an expert"),
        (texts(world) | {"numbers": str(tiny)}, "text of 'numbers': .* at least 8 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            route(copy, data, Route(train_steps=0), **TEXT)
    assert (copy / "model.safetensors").read_bytes() == before
    assert open_composite(copy).experts == ("letters", "numbers")
