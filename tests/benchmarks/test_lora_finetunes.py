"""The demo's finetunes again as adapters: a recipe that builds, and what is refused."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from experiments import lora_finetunes
from moiety.compose import Recipe
from moiety.errors import InputError


def recipe_beside(world: Any, folder: Path, training: bool) -> Path:
    """The world's recipe with each calibration text alone in a folder, or beside a training text."""
    values = world.recipe()
    for expert in values["experts"]:
        place = folder / "texts" / expert["name"]
        place.mkdir(parents=True)
        calibration = place / "calibration.jsonl"
        shutil.copy(expert["domain"]["calibration"], calibration)
        if training:
            shutil.copy(calibration, place / "train.jsonl")
        expert["domain"]["calibration"] = str(calibration)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run(monkeypatch: pytest.MonkeyPatch, recipe: Path, out: Path) -> None:
    arguments = ["--out", str(out), "--steps", "2", "--batch-size", "2", "--rank", "2"]
    monkeypatch.setattr(sys, "argv", ["lora_finetunes", str(recipe), *arguments])
    lora_finetunes.main()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_and_a_recipe_of_them(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lora"
    run(monkeypatch, recipe_beside(world, tmp_path, training=True), out)
    recipe = Recipe.read(out / "recipe.yaml")
    assert [Path(expert.model).parent for expert in recipe.experts] == [out] * len(recipe.experts)
    for expert in recipe.experts:
        trained = load_file(Path(expert.model) / "adapter_model.safetensors")
        assert all(bool(tensor.any()) for tensor in trained.values())
    with pytest.raises(Exception, match="lora"):
        run(monkeypatch, tmp_path / "recipe.yaml", out)


def test_a_recipe_of_other_texts_is_refused(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl for .*the demo wrote"):
        run(monkeypatch, recipe_beside(world, tmp_path, training=False), tmp_path / "lora")
