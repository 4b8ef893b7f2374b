"""The whole demo, small: killed, started again, finished, looked at, rebuilt from its recipe."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moiety.analysis import Trace, summarise
from moiety.analysis.evaluate import model_bytes
from moiety.compose import build
from moiety.demo.run import run
from moiety.errors import OutputError

COMMAND = [str(Path(sys.executable).with_name("moiety")), "demo", "--quick"]
ROWS = {
    "base",
    "finetune",
    "expert",
    "soup",
    "task_arithmetic",
    "composite_dense",
    "composite",
    "uniform",
    "random",
    "sequence_level",
    "oracle",
}
KINDS = {"mixture", "routed"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    """Run the demo, kill it after the first pruned expert, run it again; what it printed."""
    command = [*COMMAND, "--out", str(folder / "out"), "--cache", str(folder / "cache")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and not list(folder.glob("out/stages/expert-python-*/stage.json")):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (folder / "out" / "results.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "expert-python: already done, used again" in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(folder: Path, output: str) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())


def other_kind(results: dict[str, Any]) -> str:
    """The kind that was built and measured but not shipped."""
    [other] = KINDS - {results["choices"]["kind"]}
    return other


def test_the_better_kind_is_shipped(folder: Path, results: dict[str, Any]) -> None:
    losses = results["choices"]["held_back_loss"]
    assert losses.keys() == KINDS
    assert min(losses, key=losses.__getitem__) == results["choices"]["kind"]
    record = json.loads((folder / "out" / "composite" / "build.json").read_text())
    assert record["kind"] == results["choices"]["kind"]
    assert record["invariants"] and all(one["holds"] for one in record["invariants"])
    assert "library_name: transformers" in (folder / "out" / "composite" / "README.md").read_text()


def test_everything_is_written(folder: Path, results: dict[str, Any]) -> None:
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {
        "demo.json",
        "stages",
        "recipe.yaml",
        "composite",
        other_kind(results),
        "trace",
        "report.html",
        "results.json",
    }
    hidden = [path for path in (folder / "out").rglob(".*") if path.name != ".gitattributes"]
    assert hidden == []


def test_results_hold_every_control(results: dict[str, Any]) -> None:
    domains = ["python", "cpp", "english", "arithmetic"]
    assert results["domains"] == domains
    assert results["seed"] == 0 and results["context_length"] == 128
    for measure in ("loss", "bits_per_byte"):
        other = other_kind(results)
        assert results[measure].keys() == ROWS | {other, f"{other}_oracle"}
        for row in results[measure].values():
            assert list(row) == domains
            assert all(math.isfinite(value) and value > 0 for value in row.values())
    assert 0 <= results["accuracy"]["arithmetic"]["composite"] <= 1
    assert {"composite", "composite_dense"} <= results["tokens_per_second"].keys()
    assert {"models", "evaluate", "shared", "route", "trace"} <= results["seconds"].keys()


def mean(results: dict[str, Any], row: str) -> float:
    return sum(results["loss"][row].values()) / len(results["domains"])


def test_the_claims_hold_in_small(results: dict[str, Any]) -> None:
    """Finetunes beat the base at home, pruning costs little, the right expert beats the wrong."""
    for domain in results["domains"]:
        assert results["loss"]["finetune"][domain] < results["loss"]["base"][domain]
        cost = results["loss"]["expert"][domain] - results["loss"]["finetune"][domain]
        assert cost < 0.03
    assert mean(results, "oracle") < mean(results, "composite") < mean(results, "random")
    assert mean(results, "composite") < mean(results, "uniform")
    assert results["routing"]["normalized_mutual_information"] > 0.3
    shares = results["routing"]["own_domain_share"]
    assert all(share > 1 / len(shares) for share in shares.values())


def test_bytes_are_those_of_the_files(folder: Path, results: dict[str, Any]) -> None:
    tensors = load_file(folder / "out" / "composite" / "model.safetensors")
    assert results["bytes"]["composite"] == sum(t.nbytes for t in tensors.values())
    packed, dense = results["bytes"]["experts_packed"], results["bytes"]["experts_dense"]
    assert packed * 16 == dense * 9
    model = AutoModelForCausalLM.from_pretrained(folder / "out" / "composite")
    assert model_bytes(model) == results["bytes"]


def test_trace_and_results_agree(folder: Path, results: dict[str, Any]) -> None:
    summary = summarise(Trace.open(folder / "out" / "trace"))
    routing = results["routing"]
    assert summary.normalized_mutual_information == routing["normalized_mutual_information"]
    for domain, loss in summary.loss.items():
        assert loss == pytest.approx(results["loss"]["composite"][domain], abs=1e-3)


def test_the_terminal_shows_the_same_figures(output: str, results: dict[str, Any]) -> None:
    for row in ("base", "composite", "oracle"):
        assert f"{mean(results, row):.3f}" in output
    assert "Bytes and speed" in output and "Routing by domain" in output


def test_the_recipe_reproduces_the_composite(folder: Path, output: str) -> None:
    build(folder / "out" / "recipe.yaml", folder / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        ours, theirs = ((folder / place / name) for place in ("out/composite", "again"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_every_model_is_an_ordinary_checkpoint(folder: Path, output: str) -> None:
    composite = AutoModelForCausalLM.from_pretrained(folder / "out" / "composite")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        first = composite(ids).logits
        composite.save_pretrained(folder / "saved")
        again = AutoModelForCausalLM.from_pretrained(folder / "saved")(ids).logits
    assert torch.equal(first, again)


def test_a_finished_demo_is_shown_again_and_others_are_kept(
    folder: Path, output: str, tmp_path: Path
) -> None:
    again = subprocess.run(
        [*COMMAND, "--out", str(folder / "out"), "--json"], capture_output=True, text=True
    )
    assert again.returncode == 0 and "already holds this demo" in again.stderr
    assert json.loads(again.stdout)["domains"]
    with pytest.raises(OutputError, match="holds that of"):
        run(folder / "out", quick=False)
    shutil.copy(folder / "out" / "recipe.yaml", tmp_path / "recipe.yaml")
    with pytest.raises(OutputError, match="holds files"):
        run(tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
