"""From a recipe to a composite: what is built, that it is exact, that it can be resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
)

from moiety.compose import Recipe, build, open_composite, route
from moiety.compose.mixture import (
    Layout,
    MixtureBuilder,
    layout_of,
    mixture_config,
    mixture_tensors,
    packed_mixture,
    write_mixture,
    zero_gates,
)
from moiety.compose.preflight import preflight
from moiety.compose.recipe import Route
from moiety.compose.stages import Stages
from moiety.errors import InputError, OutputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.export import export_dense
from moiety.experts.modules import SparseExperts
from moiety.experts.quantizer import PackedConfig
from moiety.routers import find_gates, forced, one_hot

IDS = torch.arange(3, 43).reshape(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def built(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    recipe = world.write_recipe(folder / "recipe.yaml")
    build(recipe, folder / "composite")
    return folder / "composite"


def test_composite_is_a_stock_mixtral_with_packed_experts(world: Any, built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built)
    assert isinstance(model, MixtralForCausalLM)
    experts = [m for m in model.modules() if isinstance(m, SparseExperts)]
    assert len(experts) == 2
    assert model.config.moiety == {"experts": list(world.finetunes)}
    stored = sum(tensor.nbytes for m in experts for tensor in m.state_dict().values())
    assert stored * 16 == 9 * 2 * 2 * 3 * 3 * 32 * 48


def test_reload_save_and_generate_are_exact(built: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(built)
    model.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(model), logits(again))
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (built, tmp_path / "again")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    mask = torch.ones_like(IDS)
    tokens = [
        m.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
        for m in (model, again)
    ]
    assert torch.equal(*tokens)


def test_one_hot_route_is_the_expert(world: Any, tmp_path: Path) -> None:
    """With its own shared part, a mixture forced to one expert is that sparse expert's model."""
    recipe = Recipe.model_validate(world.recipe())
    builder = MixtureBuilder(recipe, Stages(tmp_path / "stages"))
    for index, folder in enumerate(builder.experts.values()):
        own = Checkpoint(folder)
        config = mixture_config(builder.layout, recipe.names, 2, builder.packing)
        gates = zero_gates(builder.layout, 3, torch.float32)
        tensors = mixture_tensors(builder.layout, own, builder.packed, gates)
        (tmp_path / f"{index}").mkdir()
        write_mixture(tmp_path / f"{index}", config, tensors, builder.tokenizer, None)
        composite = open_composite(tmp_path / f"{index}")
        with forced(find_gates(composite.model), one_hot(index)):
            routed = logits(composite.model)
        alone = logits(AutoModelForCausalLM.from_pretrained(folder))
        torch.testing.assert_close(routed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "values", "bits"),
    [("0.5", "bf16", 9), ("4:8", "int8", 5), ("2:4", "int4", 3), (0.5, "int4", 3)],
)
def test_every_pattern_and_kind_of_values_builds_loads_and_routes(
    world: Any, tmp_path: Path, pattern: Any, values: str, bits: int
) -> None:
    changes = {
        "prune": {"pattern": pattern, "values": values, "refit_steps": 2},
        "compose": {"kind": "mixture", "shared": "soup"},
        "route": {"train_steps": 0},
    }
    build(world.write_recipe(tmp_path / "recipe.yaml", **changes), tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    packed = [m for m in model.modules() if isinstance(m, SparseExperts)]
    assert {(str(m.pattern), m.values) for m in packed} == {(str(pattern), values)}
    tensors = [pair for m in packed for pair in m.state_dict().items()]
    scales = [tensor for name, tensor in tensors if name.endswith("_scale")]
    assert len(scales) == (4 if values.startswith("int") else 0)
    stored = sum(tensor.nbytes for _, tensor in tensors) - sum(s.nbytes for s in scales)
    assert stored * 8 == bits * 2 * 3 * 3 * 32 * 48
    assert logits(model).isfinite().all()
    export_dense(tmp_path / "out", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    data = {name: texts["calibration"] for name, texts in world.texts.items()}
    report = route(tmp_path / "out", data, Route(init="centroid", train_steps=2), context_length=32)
    assert report.parameters == 2 * 3 * 32


def layers(count: int) -> Layout:
    """The layout of a Llama with so many layers."""
    return layout_of(LlamaConfig(num_hidden_layers=count))


def packings(*changes: dict[str, Any]) -> dict[str, PackedConfig | None]:
    """How each of some finetunes with one layer is packed, changed from 2:4 in bf16."""
    modules = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    usual = {"pattern": "2:4", "modules": modules, "values": "bf16"}
    return {f"e{i}": PackedConfig(**{**usual, **change}) for i, change in enumerate(changes)}


def test_experts_of_a_layer_must_be_packed_alike() -> None:
    up = "model.layers.0.mlp.up_proj"
    own = {"patterns": {up: "0.5"}}
    for changes, message in (
        (({}, {"values": "int8"}), "one kind of values.* e0 has bf16 and e1 has int8"),
        (({}, {"pattern": "0.5"}), "layer 0.* one pattern.*e0's gate_proj has 2:4 and e1's gate"),
        ((own, own), "e0's gate_proj has 2:4 and e0's up_proj has 0.5; prune them alike"),
        (({}, {"modules": [up]}), "e1's gate_proj has none"),
    ):
        with pytest.raises(InputError, match=message):
            packed_mixture(layers(1), packings(*changes))
    with pytest.raises(InputError, match="e0 has bf16 and e1 has none"):
        packed_mixture(layers(1), {**packings({}), "e1": None})
    assert packed_mixture(layers(1), {"e0": None, "e1": None}) is None


def test_layers_may_differ_and_may_stay_dense() -> None:
    modules = [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1, 3) for n in ("gate", "up", "down")]
    patterns = {name: "0.25" for name in modules if ".3." in name}
    each = PackedConfig(pattern="0.5", modules=modules, values="int8", patterns=patterns)
    packed = packed_mixture(layers(4), {"a": each, "b": each})
    assert packed is not None and packed.values == "int8"
    assert packed.modules == [f"model.layers.{layer}.mlp.experts" for layer in (0, 1, 3)]
    assert [str(packed.pattern_of(name)) for name in packed.modules] == ["0.5", "0.5", "0.25"]


def _mistral(llama: Any) -> Any:
    fields = llama.config.to_dict()
    del fields["model_type"], fields["architectures"]
    model = MistralForCausalLM(MistralConfig(**{**fields, "sliding_window": None})).eval()
    model.load_state_dict(llama.state_dict())
    return model


def test_a_second_build_does_nothing_and_a_new_setting_redoes_only_its_stage(
    world: Any, built: Path
) -> None:
    recipe = Recipe.read(built / "recipe.yaml")
    before = (built / "model.safetensors").stat().st_mtime_ns
    assert build(recipe, built).composite == built
    assert (built / "model.safetensors").stat().st_mtime_ns == before
    changed = recipe.model_copy(update={"route": Route(train_steps=0)})
    with pytest.raises(OutputError, match="holds another one"):
        build(changed, built)
    work = built.with_name("composite.stages")
    known = {path.name for path in work.iterdir()}
    build(changed, built.with_name("untrained"), work=work)
    assert {p.name.partition("-")[0] for p in work.iterdir() if p.name not in known} == {"route"}


def test_a_killed_build_goes_on_and_ends_with_the_same_files(
    world: Any, built: Path, tmp_path: Path
) -> None:
    recipe, out = world.write_recipe(tmp_path / "recipe.yaml"), tmp_path / "composite"
    code = f"from moiety.compose import build\nbuild({str(recipe)!r}, {str(out)!r})"
    child = subprocess.Popen([sys.executable, "-c", code])
    work = tmp_path / "composite.stages"
    deadline = time.monotonic() + 120
    while child.poll() is None and not list(work.glob("expert-numbers-*/stage.json")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not out.exists()
    done = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    build(recipe, out)
    assert all((work / n).stat().st_mtime_ns == t for n, t in done.items() if n[0] != ".")
    assert not [path for path in work.iterdir() if path.name.startswith(".")]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (built / name).read_bytes()


def test_route_changes_the_gates_alone(world: Any, built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "composite"
    subprocess.run(["cp", "-r", str(built), str(folder)], check=True)
    before = load_file(folder / "model.safetensors")
    data = {name: texts["calibration"] for name, texts in world.texts.items()}
    report = route(folder, data, Route(init="centroid", train_steps=2), context_length=32)
    after = load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(2)}
    assert report.parameters == 2 * 3 * 32 == sum(after[name].numel() for name in changed)
    assert report.training is not None
    assert report.training.parameters == report.parameters
    assert json.loads((folder / "route.json").read_text())["parameters"] == report.parameters
    with pytest.raises(InputError, match="domains named like the experts"):
        route(folder, {"poetry": next(iter(data.values()))}, context_length=32)


def other_models(world: Any, folder: Path) -> dict[str, Path]:
    """Models that are no finetunes of the tiny base, each in its own way."""
    base = LlamaForCausalLM.from_pretrained(world.base)
    vocabulary = len(world.tokenizer)
    made = {
        "hidden_size is 64": _llama(base.config, hidden_size=64),
        "vocab_size is 400": _llama(base.config, vocab_size=400),
        "num_hidden_layers is 3": _llama(base.config, num_hidden_layers=3),
        "rms_norm_eps is": _llama(base.config, rms_norm_eps=1e-3),
        "model_type is 'mistral'": _mistral(base),
    }
    assert vocabulary == base.config.vocab_size
    for number, (reason, model) in enumerate(made.items()):
        model.save_pretrained(folder / str(number))
        world.tokenizer.save_pretrained(folder / str(number))
        made[reason] = folder / str(number)
    return made


def _llama(config: LlamaConfig, **changes: Any) -> LlamaForCausalLM:
    fields = config.to_dict()
    del fields["model_type"], fields["architectures"]
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))


def test_finetunes_of_another_base_are_all_named(world: Any, tmp_path: Path) -> None:
    for reason, folder in other_models(world, tmp_path).items():
        values = world.recipe()
        values["experts"][1]["model"] = str(folder)
        with pytest.raises(InputError, match=f"expert numbers.*another base.*{reason}"):
            preflight(Recipe.model_validate(values))


def test_every_problem_is_in_one_report(world: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(b"\x89PNG\0\xff")
    values = world.recipe()
    values["experts"][0]["domain"] = {"calibration": str(tmp_path / "empty.txt")}
    values["experts"][1]["domain"] = {"calibration": str(tmp_path / "binary.bin")}
    values["experts"][2]["model"] = str(tmp_path / "nowhere")
    values["evaluate"] = {"problems": {"sums": str(tmp_path / "sums.jsonl")}}
    out = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        build(Recipe.model_validate(values), out)
    message = str(caught.value)
    assert "4 problems" in message and "evaluate.problems.sums" in message
    for part in ("expert letters", "empty.txt", "expert numbers", "binary.bin", "expert colours"):
        assert part in message
    assert not out.exists() and not list(tmp_path.glob("*stages*"))


def test_other_tokenizers_and_packed_finetunes_are_refused(
    world: Any, built: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.finetunes["letters"])
    model.save_pretrained(tmp_path / "other")
    world.tokenizer.save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    values = world.recipe()
    values["experts"][0]["model"] = str(tmp_path / "other")
    with pytest.raises(InputError, match="another vocabulary"):
        preflight(Recipe.model_validate(values))
    packed = next(built.with_name("composite.stages").glob("expert-letters-*")) / "model"
    values["experts"][0]["model"] = str(packed)
    with pytest.raises(InputError, match="already packed"):
        preflight(Recipe.model_validate(values))


def test_an_output_folder_that_is_not_ours_is_kept(world: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("kept")
    recipe = world.write_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(OutputError, match="holds files"):
        build(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "kept"


def test_lower_layers_learn_through_packed_experts(built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built)
    model.requires_grad_(False)
    gates = find_gates(model)
    for gate in gates:
        gate.module.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for gate in gates:
        gradient = gate.module.get_parameter("weight").grad
        assert gradient is not None and gradient.abs().sum() > 0
