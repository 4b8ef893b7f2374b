"""Pruning a whole model: what is written, that it reloads exactly, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moiety.errors import InputError, OutputError
from moiety.experts import Pattern, PruneSettings, prune
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.kernels import reference
from moiety.experts.modules import SparseLinear

SETTINGS = PruneSettings(context_length=32, windows=12, batch_size=5)


@pytest.fixture(scope="module")
def pruned(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "letters"
    settings = PruneSettings(sites="all", context_length=32, windows=12, batch_size=5)
    prune(world.finetunes["letters"], out, world.texts["letters"]["calibration"], settings)
    return out


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_packed_model_is_its_dense_self(world: Any, pruned: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(pruned)
    dense = AutoModelForCausalLM.from_pretrained(world.finetunes["letters"])
    sparse = {n: m for n, m in packed.named_modules() if isinstance(m, SparseLinear)}
    assert len(sparse) == 2 * 7
    for name, module in sparse.items():
        weight = dense.get_submodule(name).get_parameter("weight")
        expanded = _dense(module)
        assert Pattern(2, 4).holds(expanded)
        with torch.no_grad():
            weight.copy_(expanded)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-4, atol=1e-5)


def _dense(module: SparseLinear) -> torch.Tensor:
    return reference.expand(module.weight, module.weight_mask, module.in_features)


def test_bytes_are_nine_sixteenths_on_disk_and_in_memory(pruned: Path) -> None:
    tensors = load_file(pruned / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(pruned)
    for place in (tensors, dict(model.named_parameters())):
        masks = {n: t for n, t in place.items() if n.endswith("weight_mask")}
        values = {n: place[n.removesuffix("_mask")] for n in masks}
        assert all(t.dtype == torch.bfloat16 for t in values.values())
        dense = sum(2 * t.numel() * 2 for t in values.values())
        stored = sum(t.nbytes for t in (*masks.values(), *values.values()))
        assert stored * 16 == dense * 9


def test_save_and_reload_is_exact(pruned: Path, tmp_path: Path) -> None:
    first = AutoModelForCausalLM.from_pretrained(pruned)
    first.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(first), logits(again))
    assert (
        load_file(pruned / "model.safetensors").keys()
        == load_file(tmp_path / "again" / "model.safetensors").keys()
    )


def test_generate_runs_on_packed_weights(pruned: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(pruned)
    ids = torch.arange(3, 9)[None]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert output.shape == (1, 10)


def test_report_records_every_matrix(pruned: Path) -> None:
    report = json.loads((pruned / "pruning.json").read_text())
    assert len(report["matrices"]) == 14
    for matrix in report["matrices"]:
        assert 0 < matrix["error_after_refit"] < 1
        assert matrix["error_after_refit"] < matrix["error_after_method"] * 1.01
    assert report["packed_bytes"] < report["dense_bytes"]


def test_same_input_gives_the_same_bytes(world: Any, tmp_path: Path) -> None:
    text = world.texts["numbers"]["calibration"]
    for name in ("one", "two"):
        prune(world.finetunes["numbers"], tmp_path / name, text, SETTINGS)
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


def test_pruning_beats_its_controls(world: Any, tmp_path: Path) -> None:
    errors = {}
    for method, steps in (("magnitude", 0), ("wanda", 0), ("sparsegpt", 0), ("sparsegpt", 20)):
        settings = PruneSettings(method=method, refit_steps=steps, context_length=32, windows=12)
        text = world.texts["letters"]["calibration"]
        out = tmp_path / f"{method}{steps}"
        report = prune(world.finetunes["letters"], out, text, settings)
        errors[method, steps] = sum(m.error_after_refit for m in report.matrices)
    assert errors["sparsegpt", 20] < errors["sparsegpt", 0] < errors["wanda", 0]
    assert errors["wanda", 0] < errors["magnitude", 0] * 1.05


def damage(folder: Path, change: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    config = json.loads((folder / "config.json").read_text())
    match change:
        case "mask bit":
            tensors[f"{name}_mask"][0, 0] ^= 1
        case "missing mask":
            del tensors[f"{name}_mask"]
        case "missing values":
            del tensors[name]
        case "missing norm":
            del tensors["model.norm.weight"]
        case "nan":
            tensors[name][0, 0] = float("nan")
        case "version":
            config["quantization_config"]["version"] = 9
        case "module":
            config["quantization_config"]["modules"].append("model.layers.7.mlp.up_proj")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mask bit", r"layers\.1\.mlp\.up_proj\.weight.*exactly 2:4"),
        ("missing mask", r"missing.*layers\.1\.mlp\.up_proj\.weight_mask"),
        ("missing values", r"missing.*layers\.1\.mlp\.up_proj\.weight"),
        ("missing norm", r"missing.*model\.norm\.weight"),
        ("nan", r"layers\.1\.mlp\.up_proj\.weight.*finite"),
        ("version", "version 1, but the checkpoint has 9"),
        ("module", r"expected a module model\.layers\.7\.mlp\.up_proj"),
    ],
)
def test_a_damaged_checkpoint_never_opens(
    pruned: Path, tmp_path: Path, change: str, message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(pruned, folder)
    damage(folder, change)
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_wrong_input_is_refused_before_anything_is_written(world: Any, tmp_path: Path) -> None:
    model, text = world.finetunes["letters"], world.texts["letters"]["calibration"]
    binary, empty = tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(bytes(range(256)))
    empty.write_text(" \n")
    out = tmp_path / "out"
    for data, message in ((binary, "binary file"), (empty, "empty"), (tmp_path / "no", "none")):
        with pytest.raises(InputError, match=message):
            prune(model, out, data, SETTINGS)
    with pytest.raises(InputError, match="model folder or a hub id"):
        prune(tmp_path / "nothing", out, text, SETTINGS)
    with pytest.raises(InputError, match="multiple of 64"):
        prune(model, out, text, PruneSettings(pattern="32:64", context_length=32))
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="holds files"):
        prune(model, out, text, SETTINGS)
    assert (out / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("field", "value"),
    [("pattern", "3"), ("sites", "mlp"), ("method", "x"), ("values", "int3"), ("windows", 0)],
)
def test_settings_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        PruneSettings(**{field: value})


def test_truncated_weights_are_named(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="safetensors file at"):
        Checkpoint(tmp_path / "cut")
