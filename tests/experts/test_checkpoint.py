"""Reading checkpoints: dtypes, shards, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from moiety.errors import InputError
from moiety.experts.checkpoint import INDEX, Checkpoint, digest_of_model


@pytest.fixture(scope="module")
def shards(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "shards"
    LlamaForCausalLM.from_pretrained(world.base).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    for file in shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_index(folder: Path, **fields: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, **fields}))


def test_shards_read_like_one_file(world: Any, shards: Path) -> None:
    whole, parts = Checkpoint(world.base), Checkpoint(shards)
    assert len(set(parts.files.values())) > 2
    assert whole.shapes() == parts.shapes()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept(world: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    model = LlamaForCausalLM.from_pretrained(world.base, dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    assert {tensor.dtype for tensor in checkpoint.values()} == {dtype}
    assert "lm_head.weight" not in checkpoint


def test_pickled_weights_are_refused(copied: Path) -> None:
    for file in copied.glob("*.safetensors*"):
        file.unlink()
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match=r"pytorch_model\.bin, a pickle .*save_pretrained"):
        Checkpoint(copied)
    (copied / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="there are none"):
        Checkpoint(copied)
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="PEFT adapter"):
        Checkpoint(copied)


def test_incomplete_shards_are_refused(copied: Path) -> None:
    weights = json.loads((copied / INDEX).read_text())["weight_map"]
    change_index(copied, weight_map={**weights, "model.extra": weights["model.norm.weight"]})
    with pytest.raises(InputError, match=r"expected tensor model\.extra in .* incomplete"):
        Checkpoint(copied)
    change_index(copied, weight_map=[])
    with pytest.raises(InputError, match="weight_map"):
        Checkpoint(copied)
    change_index(copied, weight_map=weights)
    first = copied / weights["model.norm.weight"]
    whole = first.read_bytes()
    first.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=f"safetensors file at .*{first.name}"):
        Checkpoint(copied)
    first.unlink()
    with pytest.raises(InputError, match=f"weight file .*{first.name}.* missing"):
        Checkpoint(copied)


def test_the_digest_names_the_contents(world: Any, shards: Path, copied: Path) -> None:
    assert digest_of_model(shards) == digest_of_model(copied) != digest_of_model(world.base)
    (copied / "notes.md").write_text("nothing to do with the model")
    assert digest_of_model(shards) == digest_of_model(copied)
    (copied / "config.json").write_text("{}")
    assert digest_of_model(shards) != digest_of_model(copied)


def test_a_hub_id_is_found_in_the_cache(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, commit = tmp_path / "models--owner--tiny", "a" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(world.base, cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Checkpoint("owner/tiny").shapes() == Checkpoint(world.base).shapes()
    with pytest.raises(InputError, match="'owner/other' is no folder here and the hub gave"):
        Checkpoint("owner/other")
