"""Sparse task vectors: base plus differences, exactly, and never on the wrong base."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moiety.errors import InputError
from moiety.experts import PruneSettings, merge_delta, open_delta, prune
from moiety.experts.delta import DeltaLinear, TaskVector
from moiety.experts.unpack import dense_view

SETTINGS = PruneSettings(sites="all", context_length=32, windows=8, values="fp32")


@pytest.fixture(scope="module")
def delta(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("delta") / "letters"
    text = world.texts["letters"]["calibration"]
    prune(world.finetunes["letters"], out, text, SETTINGS, base=world.base)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23).reshape(2, 10)).logits


def test_base_plus_differences_is_nearer_than_the_pruned_finetune(
    world: Any, delta: Path, tmp_path: Path
) -> None:
    dense = dense_view(world.finetunes["letters"])
    text = world.texts["letters"]["calibration"]
    prune(world.finetunes["letters"], tmp_path / "whole", text, SETTINGS)
    whole, restored = dense_view(tmp_path / "whole"), dict(TaskVector(delta).tensors())
    assert restored.keys() == set(dense)
    for name in whole.packed:
        far = (whole[name] - dense[name]).norm()
        near = (restored[name] - dense[name]).norm()
        assert near < far / 2


def test_open_delta_computes_what_the_merged_model_does(delta: Path, tmp_path: Path) -> None:
    model = open_delta(delta)
    assert sum(isinstance(module, DeltaLinear) for module in model.modules()) == 14
    merge_delta(delta, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-5)


def test_only_what_differs_is_stored(world: Any, delta: Path) -> None:
    stored, base = load_file(delta / "model.safetensors"), dense_view(world.base)
    plain = {n for n in stored if not n.endswith("_mask") and f"{n}_mask" not in stored}
    assert plain == {n for n in plain if "norm" in n}
    assert all(not torch.equal(stored[name], base[name]) for name in plain)


def test_a_task_vector_is_not_mistaken_for_a_model(world: Any, delta: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"differences to a base.*open_delta"):
        AutoModelForCausalLM.from_pretrained(delta)
    with pytest.raises(InputError, match="holds whole weights"):
        open_delta(world.finetunes["letters"])
    with pytest.raises(InputError, match="task vector"):
        prune(delta, tmp_path / "again", world.texts["letters"]["calibration"], SETTINGS)


def test_another_base_or_damage_is_refused(world: Any, delta: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is another model"):
        open_delta(delta, world.finetunes["numbers"])
    shutil.copytree(delta, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight_mask"][0, 0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        open_delta(tmp_path / "damaged")


def test_a_moved_base_is_found_again(world: Any, delta: Path, tmp_path: Path) -> None:
    shutil.copytree(world.base, tmp_path / "moved")
    assert torch.equal(logits(open_delta(delta)), logits(open_delta(delta, tmp_path / "moved")))


def test_what_does_not_go_with_a_base_is_refused(world: Any, tmp_path: Path) -> None:
    text = world.texts["letters"]["calibration"]
    settings = PruneSettings(pattern="0.4", schedule=("0.7",), context_length=32)
    with pytest.raises(InputError, match="schedule or base, not both"):
        prune(world.finetunes["letters"], tmp_path / "out", text, settings, base=world.base)
