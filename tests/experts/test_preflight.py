"""Inputs that do not fit each other are refused before anything is pruned or written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from moiety.errors import InputError
from moiety.experts import (
    Finetune,
    PruneSettings,
    WidthSettings,
    prune,
    prune_many,
    prune_width,
    recover,
    rescue,
)

SETTINGS = PruneSettings(sites="all", context_length=32, windows=4, refit_steps=0)


def other(world: Any, folder: Path, **changes: Any) -> Path:
    """A random model with the world's tokenizer and another configuration."""
    values = json.loads((world.base / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**{**values, **changes})).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(world.base / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def packed(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    prune(world.finetunes["letters"], out, world.texts["letters"]["calibration"], SETTINGS)
    return out


@pytest.fixture(scope="module")
def vector(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task vector."""
    out = tmp_path_factory.mktemp("vector") / "out"
    text = world.texts["letters"]["calibration"]
    prune(world.finetunes["letters"], out, text, SETTINGS, base=world.base)
    return out


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": 64}, "hidden_size 64"),
        ({"intermediate_size": 64}, "intermediate_size 64"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3"),
    ],
)
def test_a_base_of_another_architecture(
    world: Any, tmp_path: Path, change: dict[str, int], field: str
) -> None:
    base, text = other(world, tmp_path / "other", **change), world.texts["letters"]["calibration"]
    with pytest.raises(InputError, match=f"to have {field}, as the base"):
        prune(world.finetunes["letters"], tmp_path / "out", text, SETTINGS, base=base)
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_masks_of_another_architecture(world: Any, packed: Path, tmp_path: Path) -> None:
    wide = other(world, tmp_path / "other", intermediate_size=64)
    text = world.texts["letters"]["calibration"]
    with pytest.raises(InputError, match=r"gate_proj.weight_mask in .* shape \(64, 4\)"):
        prune(wide, tmp_path / "out", text, SETTINGS, masks=packed)
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_a_base_that_is_none(world: Any, vector: Path, tmp_path: Path) -> None:
    model, text = world.finetunes["letters"], world.texts["letters"]["calibration"]
    with pytest.raises(InputError, match="that model itself"):
        prune(model, tmp_path / "out", text, SETTINGS, base=model)
    with pytest.raises(InputError, match=r"base .* is a task vector"):
        prune(model, tmp_path / "out", text, SETTINGS, base=vector)
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_of_another_model_or_none(world: Any, tmp_path: Path) -> None:
    text = world.texts["letters"]["calibration"]
    small, bare = other(world, tmp_path / "small", vocab_size=40), tmp_path / "bare"
    shutil.copytree(world.base, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    for model, message in ((small, "token ids below 40"), (bare, "a tokenizer in .*bare")):
        with pytest.raises(InputError, match=message):
            prune(model, tmp_path / "out", text, SETTINGS)
        with pytest.raises(InputError, match=message):
            prune_width(model, tmp_path / "out", text, WidthSettings(context_length=32))
    assert {path.name for path in tmp_path.iterdir()} == {"small", "bare"}


def finetunes(world: Any, **models: Any) -> list[Finetune]:
    text = world.texts["letters"]["calibration"]
    return [Finetune(name=name, model=model, data=text) for name, model in models.items()]


@pytest.mark.parametrize("name", ["../letters", "a/b", ".", "..", ""])
def test_names_that_are_no_folders(world: Any, tmp_path: Path, name: str) -> None:
    tunes = finetunes(world, **{name: world.finetunes["letters"]})
    with pytest.raises(InputError, match="can be folders"):
        prune_many(tunes, tmp_path / "out", SETTINGS)
    assert not any(tmp_path.iterdir())


def test_the_last_finetune_is_looked_at_before_the_first_is_pruned(
    world: Any, tmp_path: Path
) -> None:
    good, out = world.finetunes["letters"], tmp_path / "out"
    with pytest.raises(InputError, match="model folder or a hub id"):
        prune_many(finetunes(world, good=good, absent=tmp_path / "no"), out, SETTINGS)
    tunes = [*finetunes(world, good=good), Finetune(name="b", model=good, data=tmp_path / "no")]
    with pytest.raises(InputError, match="text file or folder"):
        prune_many(tunes, out, SETTINGS)
    assert not out.exists()


def test_a_shared_mask_that_cannot_be_shared(world: Any, tmp_path: Path) -> None:
    tunes, out = finetunes(world, letters=world.finetunes["letters"]), tmp_path / "out"
    deep = other(world, tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(InputError, match="num_hidden_layers 3"):
        prune_many(tunes, out, SETTINGS, shared_mask=deep)
    rounds = PruneSettings(pattern="0.4", schedule=("0.8",), context_length=32)
    with pytest.raises(InputError, match="a schedule or masks"):
        prune_many(tunes, out, rounds, shared_mask=world.base)
    owl = PruneSettings(pattern="0.4", allocation="owl", context_length=32)
    with pytest.raises(InputError, match="allocation uniform"):
        prune_many(tunes, out, owl, shared_mask=world.base)
    assert not out.exists()


def test_a_width_that_rounds_to_the_whole(world: Any, tmp_path: Path) -> None:
    text = world.texts["letters"]["calibration"]
    settings = WidthSettings(keep=0.9, multiple=16, context_length=32)
    with pytest.raises(InputError, match=r"fewer than 48 .* 0\.9 of them.*lower keep or multiple"):
        prune_width(world.finetunes["letters"], tmp_path / "out", text, settings)
    assert not any(tmp_path.iterdir())


def test_a_task_vector_cannot_be_recovered(world: Any, vector: Path, tmp_path: Path) -> None:
    text = world.texts["letters"]["calibration"]
    with pytest.raises(InputError, match="it is a task vector"):
        recover(vector, world.finetunes["letters"], text, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_configuration_that_is_no_object(world: Any, tmp_path: Path) -> None:
    shutil.copytree(world.base, tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"a model's fields in .*config\.json"):
        rescue(tmp_path / "odd", tmp_path / "out")
    assert not (tmp_path / "out").exists()
