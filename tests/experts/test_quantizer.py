"""Packed models in transformers: they open, equal their dense selves, save and generate."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from moiety.errors import InputError
from moiety.experts.modules import SparseExperts, SparseLinear
from moiety.experts.quantizer import PackedConfig

STORED = [
    ("2:4", "bf16"),
    ("2:4", "int8"),
    ("4:8", "int4"),
    ("0.5", "fp32"),
    ("0.5", "int8"),
    ("0.3", "int4"),
    ("1:4", "int4"),
]
IDS = torch.arange(3, 43).reshape(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def tiny_llama(kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **changes,
    }
    return kind(config(**settings)).eval()


@pytest.fixture(params=["llama", "mixtral"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def written(packs: Any, folder: Path, kind: str, pattern: str, values: str) -> Path:
    if kind == "llama":
        return packs.write_packed(tiny_llama(), folder, packs.LINEARS, pattern, values)
    return packs.write_packed(packs.tiny_mixtral(), folder, packs.EXPERTS, pattern, values)


@pytest.fixture
def reports(caplog: pytest.LogCaptureFixture) -> Any:
    """What transformers logs, its load report of missing and unexpected weights included."""
    logger = logging.get_logger("transformers")
    level = logger.level
    logger.setLevel(30)
    logger.propagate = True
    yield caplog
    logger.propagate = False
    logger.setLevel(level)


@pytest.mark.parametrize(("pattern", "values"), STORED)
def test_a_packed_model_is_its_dense_self_and_saves_the_same_bytes(
    packs: Any, tmp_path: Path, kind: str, pattern: str, values: str, reports: Any
) -> None:
    folder = written(packs, tmp_path, kind, pattern, values)
    model = AutoModelForCausalLM.from_pretrained(folder)
    sparse = [m for m in model.modules() if isinstance(m, SparseLinear | SparseExperts)]
    assert len(sparse) == (10 if kind == "llama" else 2)
    assert not reports.records
    assert not any(p.requires_grad for module in sparse for p in module.parameters())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert len({json.dumps(c["quantization_config"], sort_keys=True) for c in configs}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_request_leaves_packed_values_as_stored(
    packs: Any, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    folder = written(packs, tmp_path, kind, "0.5", "int8")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("_mask"):
            assert parameter.dtype == torch.uint8
            assert model.get_parameter(name.removesuffix("_mask")).dtype == torch.int8
        elif name.endswith("_scale"):
            assert parameter.dtype == torch.bfloat16
        elif f"{name}_mask" not in dict(model.named_parameters()):
            assert parameter.dtype == dtype
    assert logits(model).dtype == dtype
    packed = tmp_path / "bf16"
    folder = packs.write_packed(packs.tiny_mixtral(), packed, packs.EXPERTS, "2:4", "bf16")
    experts = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).model.layers[0].mlp.experts
    kept = [experts.packed(name)[0] for name in ("gate_up_proj", "down_proj")]
    assert [values.dtype for values in kept] == [torch.bfloat16] * 2


def test_biases_follow_the_requested_dtype(packs: Any, tmp_path: Path) -> None:
    model = tiny_llama(Qwen2ForCausalLM, Qwen2Config)
    modules = [f"model.layers.{layer}.self_attn.{x}_proj" for layer in range(2) for x in "qkv"]
    for module in modules:
        torch.nn.init.normal_(model.get_submodule(module).bias)
    folder = packs.write_packed(model, tmp_path, modules, "2:4", "int8")
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert packed.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    assert logits(packed).dtype == torch.bfloat16
    packed, dense = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("packed", "dense")
    )
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "disk"}])
def test_device_maps_and_shards_and_generate(
    packs: Any, tmp_path: Path, kind: str, device_map: Any
) -> None:
    folder = written(packs, tmp_path, kind, "0.5", "int4")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    plain.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    mapped: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "shards", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(logits(mapped), logits(plain))
    mask = torch.ones_like(IDS)
    ours, theirs = (
        model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
        for model in (mapped, plain)
    )
    assert torch.equal(ours, theirs)


def test_what_transformers_does_not_know_is_reported(
    packs: Any, tmp_path: Path, reports: Any
) -> None:
    """The control of the silence above."""
    folder = written(packs, tmp_path, "mixtral", "0.5", "int8")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.0.w1.strange"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    AutoModelForCausalLM.from_pretrained(folder)
    assert "UNEXPECTED" in reports.text


def test_a_packed_model_compiles_without_graph_breaks(
    packs: Any, tmp_path: Path, kind: str
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(written(packs, tmp_path, kind, "0.5", "int8"))
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        output = compiled(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(output, logits(model), rtol=1e-4, atol=1e-5)


def test_modules_may_have_their_own_patterns(packs: Any, tmp_path: Path, reports: Any) -> None:
    patterns = {packs.EXPERTS[1]: "0.25"}
    folder = packs.write_packed(
        packs.tiny_mixtral(), tmp_path, packs.EXPERTS, "2:4", "int8", patterns
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    first, second = (model.get_submodule(name) for name in packs.EXPERTS)
    assert (str(first.pattern), str(second.pattern)) == ("2:4", "0.25")
    assert not reports.records
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_a_packed_layer_is_shown_as_what_it_is(packs: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written(packs, tmp_path, "llama", "2:4", "int8"))
    linear = "SparseLinear(in_features=32, out_features=48, 2:4, int8)"
    assert linear in str(model)


def change_file(folder: Path, change: str) -> None:
    """Damage the packed Mixtral of int8 densities in one way."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    match change:
        case "mask bit":
            tensors[f"{name}_mask"][0, 0] ^= 1
        case "missing scale":
            del tensors[f"{name}_scale"]
        case "all scales":
            tensors = {n: t for n, t in tensors.items() if not n.endswith("_scale")}
        case "scale":
            tensors[f"{name}_scale"][0] = -1
        case "value":
            tensors[name][0] = -128
        case "float":
            tensors = {n: t.float() if t.dtype == torch.int8 else t for n, t in tensors.items()}
        case "kind":
            del config["quantization_config"]["values"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mask bit", r"layers\.1\.mlp\.experts\.gate_up_proj: .*exactly 0\.5"),
        ("missing scale", "conversion of the weights"),
        ("all scales", r"missing, first model\.layers\.0\.mlp\.experts\.gate_up_proj_scale"),
        ("scale", r"layers\.1\.mlp\.experts\.gate_up_proj_scale: .*above 0"),
        ("value", r"layers\.1\.mlp\.experts\.gate_up_proj: .*from -127"),
        ("float", r"layers\.0\.mlp\.experts\.gate_up_proj: expected values in int8"),
        ("kind", r"layers\.0\.mlp\.experts\.gate_up_proj: expected values in bf16, fp16, fp32"),
    ],
)
def test_a_damaged_composite_never_opens(
    packs: Any, tmp_path: Path, change: str, message: str
) -> None:
    folder = written(packs, tmp_path, "mixtral", "0.5", "int8")
    change_file(folder, change)
    with pytest.raises((InputError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "version 1, but the checkpoint has 2"),
        ({"pattern": 0.5}, "pattern must be text such as 2:4, but it is 0.5"),
        ({"pattern": "4:2"}, "fewer than all"),
        ({"pattern": None}, "pattern must be text"),
        ({"modules": "a"}, "modules must be a list of names"),
        ({"modules": None}, "modules must be a list of names"),
        ({"modules": [3]}, "modules must be a list of names"),
        ({"values": "int2"}, "values must be one of bf16, .*, but it is 'int2'"),
        ({"values": ["int8"]}, "values must be one of"),
        ({"patterns": ["2:4"]}, "patterns must map modules"),
        ({"patterns": {"b": "2:4"}}, "names b, which is not among its modules"),
        ({"patterns": {"a": "x"}}, "pattern must look like"),
    ],
)
def test_a_malformed_configuration_is_refused(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"pattern": "2:4", "modules": ["a"]}
    assert PackedConfig(**good).to_dict().keys() == {"quant_method", "version", *good}
    with pytest.raises(InputError, match=message):
        PackedConfig(**{**good, **fields})
    with pytest.raises(InputError, match="pattern must look like"):
        PackedConfig(modules=["a"])


def test_a_configuration_round_trips() -> None:
    config = PackedConfig(
        pattern="2:4", modules=["a", "b"], values="int4", patterns={"b": "0.3"}, quant_method="x"
    )
    again: Any = PackedConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert [str(again.pattern_of(name)) for name in "ab"] == ["2:4", "0.3"]
    stated: Any = LlamaConfig()
    assert PackedConfig.of(stated) is None
    stated.quantization_config = config.to_dict()
    found = PackedConfig.of(stated)
    assert found is not None and found.to_dict() == config.to_dict()
    stated.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(InputError, match="method is 'gptq'"):
        PackedConfig.of(stated)


def test_flat_int4_gates_must_fill_whole_bytes(packs: Any, tmp_path: Path) -> None:
    model = packs.tiny_mixtral(intermediate_size=45, hidden_size=36)
    folder = packs.write_packed(model, tmp_path / "x", packs.EXPERTS, "0.25", "int8")
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["values"] = "int4"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts: expected an even number"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.mlp", "model.nowhere"])
def test_only_linear_layers_and_experts_can_be_packed(
    packs: Any, tmp_path: Path, name: str
) -> None:
    folder = written(packs, tmp_path, "llama", "2:4", "bf16")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"].append(name)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=name):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_dense_model_is_not_packed_on_the_fly(packs: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    config = PackedConfig(pattern="2:4", modules=["model.layers.0.mlp.up_proj"])
    with pytest.raises(InputError, match="moiety prune"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
