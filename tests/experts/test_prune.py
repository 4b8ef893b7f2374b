"""Pruning a whole model: what is written, that it reloads exactly, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from moiety.errors import InputError, OutputError
from moiety.experts import BlockRecovery, Pattern, PruneSettings, prune
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.kernels import reference
from moiety.experts.modules import SparseLinear
from moiety.experts.prune import read_report
from moiety.experts.unpack import dense_view

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
    return reference.expand(*module.packed("weight")[:2], module.in_features)


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
        errors = matrix["errors"]
        assert list(errors) == ["sparsegpt", "refit", "stored"]
        assert 0 < errors["refit"] <= errors["sparsegpt"] < 1
        assert errors["refit"] <= errors["stored"] * 1.0001
    assert report["packed_bytes"] < report["dense_bytes"]
    assert report["errors"].keys() == {"sparsegpt", "refit", "stored"}


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
        errors[method, steps] = report.errors["stored"]
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
    out = tmp_path / "deep" / "out"
    for data, message in ((binary, "binary file"), (empty, "empty"), (tmp_path / "no", "none")):
        with pytest.raises(InputError, match=message):
            prune(model, out, data, SETTINGS)
    with pytest.raises(InputError, match="model folder or a hub id"):
        prune(tmp_path / "nothing", out, text, SETTINGS)
    with pytest.raises(InputError, match="multiple of 64"):
        prune(model, out, text, PruneSettings(pattern="32:64", context_length=32))
    assert not out.parent.exists()
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="holds files"):
        prune(model, out, text, SETTINGS)
    assert (out / "mine.txt").read_text() == "kept"


def test_mixtures_are_refused_before_anything_is_written(world: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config: Any = MixtralConfig(**sizes, vocab_size=len(tokenizer), num_attention_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    text = world.texts["letters"]["calibration"]
    with pytest.raises(InputError, match="mixtures of experts"):
        prune(tmp_path / "mixture", tmp_path / "out", text, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["mixture"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pattern", "3"),
        ("sites", "mlp"),
        ("method", "x"),
        ("values", "int3"),
        ("windows", 0),
        ("allocation", "owl"),
        ("schedule", ("0.4",)),
    ],
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


KINDS: list[dict[str, Any]] = [
    {"pattern": "4:8", "method": "wanda"},
    {"pattern": "1:4", "method": "ria", "refit_steps": 0},
    {"pattern": "0.5", "method": "sparsegpt"},
    {"pattern": "0.37", "method": "magnitude"},
    {"pattern": "2:4", "method": "alps"},
    {"pattern": "0.4", "allocation": "owl"},
    {"pattern": "0.4", "schedule": ("0.8", "0.6")},
    {"values": "int8"},
    {"values": "int4", "pattern": "0.5"},
    {"values": "fp16", "recovery": BlockRecovery(epochs=2)},
    {"sites": "*.down_proj,self_attn.q_proj"},
    {"sites": "attention"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(map(str, kind.values()))[:40])
def test_every_kind_is_written_as_it_says(world: Any, tmp_path: Path, kind: dict[str, Any]) -> None:
    settings = PruneSettings(**{"sites": "all", "context_length": 32, "windows": 8, **kind})
    text = world.texts["colours"]["calibration"]
    report = prune(world.finetunes["colours"], tmp_path / "out", text, settings)
    view, dense = dense_view(tmp_path / "out"), dense_view(world.finetunes["colours"])
    assert view.keys() == dense.keys()
    assert {f"{matrix.name}.weight" for matrix in report.matrices} == view.packed.keys()
    for matrix in report.matrices:
        weight = view[f"{matrix.name}.weight"]
        assert Pattern.parse(matrix.pattern).holds(weight)
        assert 0 < (weight != 0).float().mean() <= Pattern.parse(matrix.pattern).density + 0.01
    for name in view.keys() - view.packed.keys():
        assert torch.equal(view[name], dense[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert logits(model).isfinite().all()
    assert not (tmp_path / "out.pruning").exists()
    assert read_report(tmp_path / "out").matrices == report.matrices


def test_sites_are_what_they_say(world: Any, tmp_path: Path) -> None:
    text = world.texts["letters"]["calibration"]
    expected = {"ffn": {"gate_proj", "up_proj", "down_proj"}, "*.o_proj": {"o_proj"}}
    for number, (sites, names) in enumerate(expected.items()):
        settings = PruneSettings(sites=sites, context_length=32, windows=4)
        report = prune(world.finetunes["letters"], tmp_path / str(number), text, settings)
        assert {matrix.name.rpartition(".")[2] for matrix in report.matrices} == names


def test_owl_keeps_the_mean_density_and_differs_by_block(world: Any, tmp_path: Path) -> None:
    settings = PruneSettings(
        pattern="0.5", allocation="owl", sites="all", context_length=32, windows=8
    )
    text = world.texts["letters"]["calibration"]
    report = prune(world.finetunes["letters"], tmp_path / "out", text, settings)
    patterns = {matrix.pattern for matrix in report.matrices}
    assert len(patterns) == 2
    assert sum(map(float, patterns)) / 2 == pytest.approx(0.5, abs=1e-3)


def test_a_packed_model_can_be_pruned_further(world: Any, pruned: Path, tmp_path: Path) -> None:
    text = world.texts["letters"]["calibration"]
    settings = PruneSettings(pattern="1:4", sites="ffn", context_length=32, windows=8)
    prune(pruned, tmp_path / "out", text, settings)
    before, after = dense_view(pruned), dense_view(tmp_path / "out")
    for name, pattern in after.packed.items():
        assert pattern == (Pattern(1, 4) if ".mlp." in name else Pattern(2, 4))
        if ".mlp." not in name:
            assert torch.equal(after[name], before[name])
    with pytest.raises(InputError, match="packed before"):
        prune(pruned, tmp_path / "mixed", text, replace(settings, values="int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_dense_pattern_changes_nothing(world: Any, tmp_path: Path) -> None:
    text = world.texts["letters"]["calibration"]
    settings = PruneSettings(pattern="dense", sites="all", context_length=32, windows=4)
    prune(world.finetunes["letters"], tmp_path / "out", text, settings)
    before, after = dense_view(world.finetunes["letters"]), dense_view(tmp_path / "out")
    assert not after.packed
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_recovery_is_recorded_and_never_worse(world: Any, tmp_path: Path) -> None:
    settings = PruneSettings(
        recovery=BlockRecovery(epochs=3), sites="all", context_length=32, windows=8, batch_size=2
    )
    text = world.texts["letters"]["calibration"]
    report = prune(world.finetunes["letters"], tmp_path / "out", text, settings)
    assert len(report.recovery) == 2
    assert all(row["error_after"] <= row["error_before"] for row in report.recovery)
    assert list(report.errors) == ["sparsegpt", "refit", "recovery", "stored"]


def test_rounds_are_reported(world: Any, tmp_path: Path) -> None:
    settings = PruneSettings(pattern="0.4", schedule=("0.8", "0.6"), context_length=32, windows=8)
    text = world.texts["letters"]["calibration"]
    report = prune(world.finetunes["letters"], tmp_path / "out", text, settings)
    assert [row["pattern"] for row in report.rounds] == ["0.8", "0.6"]
    assert report.rounds[0]["errors"]["refit"] < report.rounds[1]["errors"]["refit"]
    dense = Checkpoint(world.finetunes["letters"])
    assert report.dense_bytes == sum(tensor.nbytes for tensor in dense.values())


def test_what_does_not_go_together_is_refused(world: Any, pruned: Path, tmp_path: Path) -> None:
    text, model = world.texts["letters"]["calibration"], world.finetunes["letters"]
    scheduled = PruneSettings(pattern="0.4", schedule=("0.8",), context_length=32)
    with pytest.raises(InputError, match="a schedule or masks"):
        prune(model, tmp_path / "out", text, scheduled, masks=pruned)
    ffn_only = tmp_path / "ffn"
    prune(model, ffn_only, text, SETTINGS)
    everywhere = PruneSettings(sites="all", context_length=32, windows=4)
    with pytest.raises(InputError, match=r"expected a mask for .*self_attn"):
        prune(model, tmp_path / "out", text, everywhere, masks=ffn_only)
    other = PruneSettings(pattern="1:4", context_length=32, windows=4)
    with pytest.raises(InputError, match="2:4"):
        prune(model, tmp_path / "out", text, other, masks=ffn_only)
    assert not (tmp_path / "out").exists()
