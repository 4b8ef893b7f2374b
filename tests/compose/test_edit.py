"""Experts of a composite that exists: added, removed, replaced."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moiety.cli import app
from moiety.compose import Recipe, build, open_composite
from moiety.compose.editing import edit, pruned_anew
from moiety.compose.recipe import Domain, Expert, Prune
from moiety.errors import InputError


@pytest.fixture(scope="module")
def pair(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of two of the three finetunes."""
    folder = tmp_path_factory.mktemp("pair")
    values = world.recipe(compose={"kind": "mixture", "top_k": 1})
    values["experts"] = values["experts"][:2]
    build(Recipe.model_validate(values), folder / "pair")
    return folder / "pair"


def stages(composite: Path) -> set[str]:
    return {path.name for path in composite.with_name(f"{composite.name}.stages").iterdir()}


def test_an_expert_is_added_and_the_others_are_not_pruned_again(
    world: Any, pair: Path, tmp_path: Path
) -> None:
    before = stages(pair)
    domain = Domain(calibration=str(world.texts["colours"]["calibration"]))
    added = Expert(name="colours", model=str(world.finetunes["colours"]), domain=domain)
    edit(pair, tmp_path / "three", add=[added])
    assert open_composite(tmp_path / "three").experts == ("letters", "numbers", "colours")
    assert open_composite(pair).experts == ("letters", "numbers")
    pruned = {name for name in stages(pair) - before if name.startswith("expert-")}
    assert {name.rpartition("-")[0] for name in pruned} == {"expert-colours"}


def test_the_command_replaces_an_expert_and_measures_the_result(
    world: Any, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text given as a relative path is named in full in the new composite's recipe."""
    before = stages(pair)
    monkeypatch.chdir(world.texts["colours"]["heldout"].parent)
    options = ["--replace", f"numbers={world.finetunes['colours']}"]
    options += ["--heldout", "numbers=colours.heldout.jsonl", "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, ["edit", str(pair), *options, "--json"])
    assert shown.exit_code == 0, shown.output
    assert open_composite(tmp_path / "out").experts == ("letters", "numbers")
    pruned = {name for name in stages(pair) - before if name.startswith("expert-")}
    assert {name.rpartition("-")[0] for name in pruned} == {"expert-numbers"}
    told = json.loads(shown.stdout)
    rows = told["results"]["loss"]
    assert rows["composite"].keys() == {"letters", "numbers"}
    assert {"base", "soup", "finetune", "expert", "uniform", "random", "oracle"} < rows.keys()
    assert all(one["holds"] for one in told["invariants"])
    numbers = Recipe.read(tmp_path / "out" / "recipe.yaml").experts[1]
    assert numbers.domain.heldout == str(world.texts["colours"]["heldout"])


def test_an_expert_is_pruned_anew(world: Any, pair: Path, tmp_path: Path) -> None:
    before = stages(pair)
    prune = pruned_anew(pair, ["numbers"], {"method": "magnitude", "refit_steps": "2"})
    report = edit(pair, tmp_path / "out", prune=prune)
    pruned = {name for name in stages(pair) - before if name.startswith("expert-")}
    assert {name.rpartition("-")[0] for name in pruned} == {"expert-numbers"}
    assert report.experts["letters"].parent.name in before
    numbers = Recipe.read(tmp_path / "out" / "recipe.yaml").experts[1]
    assert numbers.prune == Prune(method="magnitude", refit_steps=2)
    with pytest.raises(InputError, match=r"prune\.pattern must be the recipe's \(2:4\)"):
        edit(pair, tmp_path / "other", prune=pruned_anew(pair, ["numbers"], {"pattern": "1:4"}))
    with pytest.raises(InputError, match=r"prune\.methd: Extra inputs"):
        pruned_anew(pair, ["numbers"], {"methd": "alps"})


def test_what_cannot_be_changed_is_refused(world: Any, pair: Path, tmp_path: Path) -> None:
    twice = Expert(name="letters", model="x", domain=Domain(calibration="x"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"remove": ["law"]}, r"experts \(letters, numbers\), but got law"),
        ({"remove": ["numbers"]}, "at least 2"),
        ({"add": [twice]}, "letters is twice"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            edit(pair, tmp_path / "out", **changes)
    with pytest.raises(InputError, match=r"expected a composite.*no recipe\.yaml"):
        edit(world.base, tmp_path / "out", remove=["letters"])
    assert not (tmp_path / "out").exists()
