"""`moiety recipe init`: what it writes reads back, names are valid, nothing is overwritten."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moiety.compose import Recipe
from moiety.compose.recipe import init_recipe
from moiety.compose.recipe.init import NO_BASE, find_base
from moiety.compose.recipe.kinds import KINDS
from moiety.compose.recipe.mergekit import expert_names
from moiety.errors import InputError, OutputError


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_written_reads_back_with_every_default(tmp_path: Path, kind: str) -> None:
    made = init_recipe(["a/code", "b/law"], tmp_path / "r.yaml", base="a/base", kind=kind)
    recipe = Recipe.read(made.path)
    assert (recipe.base, recipe.names, recipe.compose.kind) == ("a/base", ["code", "law"], kind)
    assert recipe == Recipe.model_validate(
        {
            "base": "a/base",
            "experts": [{"name": "code", "model": "a/code"}, {"name": "law", "model": "b/law"}],
            "compose": {"kind": kind},
        }
    )
    written = yaml.safe_load(made.path.read_text())
    parts = {name: type(recipe).model_fields[name].default for name in ("prune", "route")}
    for name, default in {**parts, "compose": KINDS[kind]()}.items():
        assert written[name].keys() == type(default).model_fields.keys()


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_setting_is_explained(tmp_path: Path, kind: str) -> None:
    init_recipe(["a/code", "b/law"], tmp_path / "r.yaml", base="a/base", kind=kind)
    text = (tmp_path / "r.yaml").read_text()
    settings = text.partition("\ndtype:")[2].splitlines()[1:]
    plain = [line for line in settings if line and not line.lstrip().startswith("#")]
    assert all("  # " in line for line in plain if not line.endswith(":")), text
    assert len(plain) > 15
    assert "or magnitude, wanda, ria, alps" in text


def test_names_are_valid_and_unique() -> None:
    models = ["a/code", "b/code", "c/law v2", "-x", "org/ü+model", "/"]
    assert expert_names(models) == ["code", "code-2", "law-v2", "x", "ü-model", "expert"]


def test_text_and_places(world: Any, tmp_path: Path) -> None:
    """What lies below the recipe is written relative to it, the rest in full."""
    (tmp_path / "law").mkdir()
    data = {"letters": str(world.texts["letters"]["calibration"]), "law": "later.jsonl"}
    models = [str(world.finetunes["letters"]), str(tmp_path / "law")]
    heldout = {"law": "law.heldout.jsonl"}
    made = init_recipe(models, tmp_path / "r.yaml", base="b", data=data, heldout=heldout)
    written = yaml.safe_load(made.path.read_text())["experts"]
    assert written[0]["model"] == str(world.finetunes["letters"].resolve())
    assert written[1] == {
        "name": "law",
        "model": "law",
        "domain": {"calibration": "later.jsonl", "heldout": "law.heldout.jsonl"},
    }
    recipe = Recipe.read(made.path)
    assert recipe.experts[0].domain.calibration == data["letters"]
    assert made.notes == ()


def folders(tmp_path: Path, **files: dict[str, str]) -> list[str]:
    for folder, contents in files.items():
        (tmp_path / folder).mkdir()
        for name, text in contents.items():
            (tmp_path / folder / name).write_text(text)
    return [str(tmp_path / folder) for folder in files]


def test_the_base_is_what_the_models_name(tmp_path: Path) -> None:
    adapter = {"adapter_config.json": json.dumps({"base_model_name_or_path": "org/base"})}
    card = {"README.md": "---\nbase_model: org/base\n---\n# A model\n"}
    config = {"config.json": json.dumps({"_name_or_path": "org/base"})}
    models = folders(tmp_path, adapter=adapter, card=card, config=config, silent={})
    made = init_recipe(models, tmp_path / "r.yaml")
    assert made.base == Recipe.read(made.path).base == "org/base"
    assert "the base org/base is what the models' own files name" in made.notes[0]


def test_an_unknown_base_is_a_note(tmp_path: Path) -> None:
    own = {"config.json": json.dumps({"_name_or_path": str(tmp_path / "own")})}
    one = {"adapter_config.json": json.dumps({"base_model_name_or_path": "org/one"})}
    two = {"README.md": "---\nbase_model: [org/two]\n---\n"}
    broken = {"README.md": "---\n{\n---\n"}
    models = folders(tmp_path, own=own, one=one, two=two, broken=broken)
    base, [note] = find_base(models)
    assert base is None and "one names org/one" in note and "two names org/two" in note
    base, [note] = find_base([models[0], models[3]])
    assert base is None and "write it in the place of BASE" in note
    made = init_recipe([models[0], models[3]], tmp_path / "r.yaml")
    assert made.base == NO_BASE and note in (tmp_path / "r.yaml").read_text()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("mine")
    with pytest.raises(OutputError, match=r"expected .* to be absent"):
        init_recipe(["a", "b"], tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["a"], {}, "expected at least 2 models, but got 1"),
        (["a", "b"], {"kind": "soup"}, "kind must be one of mixture.*'soup'"),
        (["a", "b"], {"data": {"c": "x"}}, "experts a, b, but c is none of them"),
        (["a", "b"], {"heldout": {"c": "x"}}, "experts a, b, but c is none of them"),
    ],
)
def test_what_cannot_be_a_recipe(
    tmp_path: Path, models: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        init_recipe(models, tmp_path / "r.yaml", **options)
    assert not any(tmp_path.iterdir())
