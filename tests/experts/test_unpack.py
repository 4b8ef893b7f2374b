"""Any checkpoint as plain names and dense tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moiety.errors import InputError
from moiety.experts.unpack import dense_view


def both(packs: Any, folder: Path, pattern: str = "0.5", values: str = "int4") -> Any:
    """The view of a packed Mixtral and the tensors of the same one written dense."""
    model = packs.tiny_mixtral()
    packed = packs.write_packed(model, folder, packs.EXPERTS, pattern, values)
    return dense_view(packed), load_file(folder / "dense" / "model.safetensors")


@pytest.mark.parametrize(
    ("pattern", "values"), [("2:4", "bf16"), ("4:8", "int8"), ("0.5", "fp16"), ("0.3", "int4")]
)
def test_a_packed_checkpoint_looks_dense(
    packs: Any, tmp_path: Path, pattern: str, values: str
) -> None:
    view, dense = both(packs, tmp_path, pattern, values)
    assert set(view) == set(dense) and len(view) == len(dense)
    assert all(torch.equal(view[name].float(), dense[name].float()) for name in view)
    assert len(view.packed) == 2 * 3 * 3
    assert {str(rule) for rule in view.packed.values()} == {pattern}
    assert all(".experts." in name for name in view.packed)
    assert f"{next(iter(view.packed))}_mask" in view.raw
    assert not hasattr(view.config, "quantization_config")
    with pytest.raises(KeyError):
        view[f"{next(iter(view.packed))}_mask"]


def test_a_dense_checkpoint_is_itself(packs: Any, tmp_path: Path) -> None:
    packs.tiny_mixtral().save_pretrained(tmp_path)
    view, dense = dense_view(tmp_path), load_file(tmp_path / "model.safetensors")
    assert not view.packed and set(view) == set(dense)
    assert all(torch.equal(view[name], dense[name]) for name in view)


def test_a_module_may_have_its_own_pattern(packs: Any, tmp_path: Path) -> None:
    patterns = {packs.EXPERTS[1]: "1:4"}
    folder = packs.write_packed(
        packs.tiny_mixtral(), tmp_path, packs.EXPERTS, "2:4", "bf16", patterns
    )
    view = dense_view(folder)
    shares = {n.split(".")[2]: float((view[n] != 0).float().mean()) for n in view.packed}
    assert shares == pytest.approx({"0": 0.5, "1": 0.25}, abs=0.01)


NAME = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def damage(folder: Path, change: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    stated = config["quantization_config"]
    match change:
        case "no mask":
            del tensors[f"{NAME}_mask"]
        case "no scale":
            del tensors[f"{NAME}_scale"]
        case "bit":
            tensors[f"{NAME}_mask"][0, 0] ^= 1
        case "rows":
            tensors[f"{NAME}_mask"] = tensors[f"{NAME}_mask"][:24].clone()
            tensors[f"{NAME}_scale"] = tensors[f"{NAME}_scale"][:24].clone()
            tensors[NAME] = tensors[NAME][:384].clone()
        case "module less":
            stated["modules"].pop()
        case "module more":
            stated["modules"].append("model.layers.5.mlp.experts")
        case "norm":
            stated["modules"].append("model.norm")
        case "method":
            config["quantization_config"] = {"quant_method": "awq"}
        case "architecture":
            config["model_type"] = "nobody"
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no mask", f"tensor {NAME}_mask.* missing"),
        ("no scale", f"tensor {NAME}_scale.* missing"),
        ("bit", f"{NAME}: expected exactly 0.5"),
        ("rows", rf"{NAME}: expected \[48\] rows"),
        ("module less", "expected no tensor model.layers.1.*_mask"),
        ("module more", "expected a module model.layers.5"),
        ("norm", "expected model.norm to hold weight matrices"),
        ("method", "method is 'awq'"),
        ("architecture", "nobody"),
    ],
)
def test_damage_is_named(packs: Any, tmp_path: Path, change: str, message: str) -> None:
    folder = packs.write_packed(packs.tiny_mixtral(), tmp_path, packs.EXPERTS, "0.5", "int8")
    damage(folder, change)
    with pytest.raises(InputError, match=message):
        view = dense_view(folder)
        assert view[NAME] is not None
