"""The commands over results, on one tiny composite: learned, and with gates that say nothing."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from moiety.analysis import Trace, gate_swap, summarise
from moiety.analysis.comparison.gates import gate_swap_of
from moiety.analysis.results import (
    Comparison,
    Counterfactuals,
    GateSwap,
    Retention,
    RoutingSummary,
    read_result,
)
from moiety.analysis.trace import trace_model
from moiety.compose import Recipe, build, open_composite
from moiety.errors import InputError
from moiety.routers import find_gates, forced, random
from moiety.text import read_documents, token_windows
from tests.moiety.test_cli import data, moiety


@pytest.fixture(scope="module")
def built(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composite with its stages beside it, and a trace of it."""
    folder = tmp_path_factory.mktemp("analysis")
    prune = {"method": "magnitude", "refit_steps": 0}
    world.write_recipe(folder / "recipe.yaml", prune=prune)
    recipe = Recipe.read(folder / "recipe.yaml")
    build(recipe, folder / "composite", work=folder / "composite.stages")
    options = ["--context-length", 32, "--windows", 12]
    held = data(world, "heldout")
    moiety("trace", folder / "composite", *held, "--out", folder / "trace", *options)
    return folder


def test_analyse(built: Path, tmp_path: Path) -> None:
    out, _ = moiety("analyse", built / "trace", "--out", tmp_path / "s.json", "--json")
    summary = read_result(RoutingSummary, tmp_path / "s.json")
    assert json.loads(out)["nmi"]["overall"]["p_value"] == summary.nmi.overall.p_value
    assert summary.nmi.overall.p_value < 0.05 and summary.own_share is not None
    out, _ = moiety("analyse", built / "trace", "--counted", "chosen")
    assert "Routing by layer" in out
    _, log = moiety("analyse", built / "trace", "--phase", "decode", code=2)
    assert "none of 'decode'" in log
    moiety("analyse", built / "trace", "--counted", "all", code=2)


def test_a_randomly_routed_composite_does_not_specialise(
    world: Any, built: Path, tmp_path: Path
) -> None:
    composite = open_composite(built / "composite")
    windows = {
        name: token_windows(composite.tokenizer, read_documents(texts["heldout"]), 32, 12)
        for name, texts in world.texts.items()
    }
    gates = find_gates(composite.model)
    with forced(gates, random(0)):
        path = trace_model(
            composite.model,
            composite.tokenizer,
            windows,
            tmp_path / "random",
            experts=composite.experts,
        )
    found = summarise(Trace.open(path))
    assert found.nmi.overall.p_value > 0.05 and found.matching.overall.p_value > 0.05
    assert found.own_share is not None and found.own_share.overall.p_value > 0.05
    assert found.cells.found == 0
    out, _ = moiety("compare", built / "trace", tmp_path / "random", "--out", tmp_path / "c.json")
    assert "Two traces of the same text" in out
    compared = read_result(Comparison, tmp_path / "c.json")
    numpy.testing.assert_allclose(compared.agreement_L, 0, atol=0.05)
    with torch.no_grad():
        other = open_composite(built / "composite")
        for gate in find_gates(other.model):
            for parameter in gate.module.parameters():
                parameter.zero_()
    swapped = gate_swap_of(composite.model, other.model, windows)
    for domain in windows:
        assert swapped.first_with_second[domain].value == pytest.approx(
            swapped.second[domain].value, abs=1e-5
        )
        assert swapped.change_first[domain].value == pytest.approx(
            -swapped.change_second[domain].value, abs=1e-5
        )


def test_gates_swapped_by_command(world: Any, built: Path, tmp_path: Path) -> None:
    composite, held = built / "composite", data(world, "heldout")
    options = ["--context-length", 32, "--windows", 4, "--out", tmp_path / "g.json"]
    out, _ = moiety("compare", composite, composite, *held, *options)
    assert "Gates swapped" in out
    result = read_result(GateSwap, tmp_path / "g.json")
    assert all(change.value == 0 for change in result.change_first.values())
    _, log = moiety("compare", built / "trace", composite, *held, code=2)
    assert "is a trace" in log
    with pytest.raises(InputError, match="expected a mixture of experts"):
        gate_swap(composite, world.base, {"a": world.texts["letters"]["heldout"]})


def test_counterfactuals_by_command(world: Any, built: Path, tmp_path: Path) -> None:
    held = data(world, "heldout")
    options = ["--context-length", 32, "--windows", 8, "--tokens", 2]
    name = tmp_path / "c.json"
    out, _ = moiety("counterfactuals", built / "composite", *held, *options, "--out", name)
    assert "Regret of the model's own routes" in out and "Experts swapped" in out
    result = read_result(Counterfactuals, name)
    assert result.best_expert == {domain: domain for domain in world.texts}
    _, log = moiety("counterfactuals", built / "composite", *held, "--experts", "x", code=2)
    assert "--experts must look like" in log
    _, log = moiety("counterfactuals", "absent", *held, "--out", tmp_path, code=2)
    assert "to be a file to write" in log


def test_retention_by_command(built: Path, tmp_path: Path) -> None:
    recipe, composite = built / "recipe.yaml", built / "composite"
    name = tmp_path / "r.json"
    out, _ = moiety("retention", recipe, "--composite", composite, "--out", name)
    assert "Sparse less dense" in out
    result = read_result(Retention, name)
    for expert in result.experts:
        assert result.base[expert].value > result.dense[expert][expert].value
        change = result.sparse[expert][expert].value - result.dense[expert][expert].value
        assert result.change[expert][expert].value == pytest.approx(change)
        assert result.change[expert][expert].low <= change <= result.change[expert][expert].high
        gain = result.base[expert].value - result.dense[expert][expert].value
        assert result.retained[expert].value == pytest.approx(1 - change / gain)
    assert result.composite is not None and result.composite_retained is not None
    home = numpy.mean([result.change[e][e].value for e in result.experts])
    assert result.home.value == pytest.approx(home)
    _, log = moiety("retention", recipe, code=2)
    assert "--composite DIR, --work DIR or both" in log
