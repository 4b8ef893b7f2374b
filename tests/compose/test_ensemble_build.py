"""Ensembles on disk: built from a recipe, opened, saved again, damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from moiety.compose import Recipe
from moiety.compose.ensemble import EnsembleConfig, EnsembleForCausalLM
from moiety.compose.ensemble.builder import (
    EnsembleBuilder,
    common_config,
    ensemble_config,
    ensemble_tensors,
    packed_ensemble,
)
from moiety.compose.stages import Stages
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.modules import SparseLinear
from moiety.experts.quantizer import PackedConfig
from moiety.experts.shards import write_weights

IDS = torch.arange(3, 43).reshape(2, 20)
PRIOR = {"letters": 1.0, "numbers": 1.0, "colours": 2.0}


def log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=IDS).logits.float()
    return logits if isinstance(model, EnsembleForCausalLM) else logits.log_softmax(-1)


@pytest.fixture(scope="module")
def builder(world: Any, tmp_path_factory: pytest.TempPathFactory) -> EnsembleBuilder:
    recipe = world.recipe(
        compose={"kind": "ensemble", "prior": PRIOR}, prune={"refit_steps": 2, "values": "fp32"}
    )
    stages = Stages(tmp_path_factory.mktemp("ensemble") / "stages")
    return EnsembleBuilder(Recipe.model_validate(recipe), stages)


@pytest.fixture(scope="module")
def built(builder: EnsembleBuilder) -> Path:
    folder = builder.stages.folder.with_name("built")
    folder.mkdir()
    builder.write(folder)
    return folder


def test_an_ensemble_opens_packed_and_each_expert_is_the_sparse_finetune(
    builder: EnsembleBuilder, built: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(built)
    assert isinstance(model, EnsembleForCausalLM)
    packed = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(packed) == 3 * 2 * 7
    for name in builder.recipe.names:
        with model.forced(name):
            assert torch.equal(log_probs(model), log_probs(builder.open_expert(name)))
    assert builder.facts() == {
        "experts": list(PRIOR),
        "prior": {"letters": 0.25, "numbers": 0.25, "colours": 0.5},
        "trained_parameters": 0,
    }
    assert model.config.priors == [0.25, 0.25, 0.5]
    assert model.generation_config.eos_token_id == 1


def test_dense_parts_are_the_finetunes(
    world: Any, builder: EnsembleBuilder, tmp_path: Path
) -> None:
    builder.write(tmp_path, dense=True)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    for name, folder in world.finetunes.items():
        alone = AutoModelForCausalLM.from_pretrained(folder)
        with model.forced(name):
            assert torch.equal(log_probs(model), log_probs(alone))


def test_saved_again_it_is_the_same(built: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(built)
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (built, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "moiety_shim.py").read_text() == (built / "moiety_shim.py").read_text()
    assert torch.equal(log_probs(model), log_probs(again))
    mask = torch.ones_like(IDS)
    written = [
        m.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
        for m in (model, again)
    ]
    assert torch.equal(*written)


def test_equal_experts_give_the_base(world: Any, tmp_path: Path) -> None:
    base = Checkpoint(world.base)
    write_weights(tmp_path, ensemble_tensors(dict.fromkeys(("a", "b"), base)))
    ensemble_config(base.config, ["a", "b"], {}, None).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(world.base)
    torch.testing.assert_close(log_probs(model), log_probs(alone), rtol=1e-6, atol=1e-6)


def damaged(built: Path, folder: Path, **fields: Any) -> Path:
    """A copy whose configuration is changed; None removes a field."""
    folder.mkdir()
    for file in built.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((built / "config.json").read_text()), **fields}
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "experts.1.model.norm.weight",
        "experts.2.model.layers.0.mlp.up_proj.weight_mask",
        "experts.0.model.embed_tokens.weight",
    ],
)
def test_missing_weights_are_refused(built: Path, tmp_path: Path, name: str) -> None:
    folder = damaged(built, tmp_path / "damaged")
    tensors = load_file(built / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"every weight in the checkpoint, but \d are missing"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_dense_ensemble_without_all_weights_is_refused_too(
    builder: EnsembleBuilder, tmp_path: Path
) -> None:
    builder.write(tmp_path, dense=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["experts.1.model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 are missing, first experts\.1\.model\.layers\.1"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_damaged_configuration_is_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"experts' names under moiety\.experts"):
        AutoModelForCausalLM.from_pretrained(damaged(built, tmp_path / "1", moiety=None))
    with pytest.raises(InputError, match="prior for every expert"):
        AutoConfig.from_pretrained(damaged(built, tmp_path / "2", prior={"letters": 1.0}))
    with pytest.raises(InputError, match="prior weights of at least 0"):
        wrong = {**PRIOR, "letters": -1.0}
        AutoConfig.from_pretrained(damaged(built, tmp_path / "3", prior=wrong))


def test_a_prior_for_other_experts_is_refused_by_the_recipe(world: Any) -> None:
    recipe = world.recipe(compose={"kind": "ensemble", "prior": {"letters": 1.0}})
    with pytest.raises(ValidationError, match="must name every expert, but numbers has none"):
        Recipe.model_validate(recipe)


def test_experts_must_compute_alike() -> None:
    configs = {"a": LlamaConfig(eos_token_id=1), "b": LlamaConfig(eos_token_id=[1, 7])}
    common = common_config(configs)
    assert isinstance(common, LlamaConfig) and common.eos_token_id == 1
    half = common_config({"a": LlamaConfig(dtype="bfloat16"), "b": LlamaConfig(dtype="float32")})
    assert half.dtype == torch.float32
    rope = {"rope_type": "default", "rope_theta": 5e5}
    with pytest.raises(InputError, match=r"rope_parameters is .* for a and .* for b"):
        common_config({**configs, "b": LlamaConfig(rope_parameters=rope)})


def test_packings_are_joined_under_the_experts_names() -> None:
    a = PackedConfig(pattern="2:4", modules=["x", "y"], values="int8")
    b = PackedConfig(pattern="0.5", modules=["x"], values="int8")
    joined = packed_ensemble({"a": a, "none": None, "b": b})
    assert joined is not None and joined.values == "int8"
    assert joined.modules == ["experts.0.x", "experts.0.y", "experts.2.x"]
    assert [str(joined.pattern_of(m)) for m in joined.modules] == ["2:4", "2:4", "0.5"]
    assert packed_ensemble({"a": None}) is None
    with pytest.raises(InputError, match="one kind of values"):
        packed_ensemble({"a": a, "b": PackedConfig(pattern="2:4", modules=["x"])})


def test_the_configuration_answers_for_its_experts() -> None:
    config = EnsembleConfig(
        text_config=LlamaConfig(vocab_size=99, max_position_embeddings=77),
        moiety={"experts": ["a", "b"]},
    )
    assert (config.vocab_size, config.max_position_embeddings) == (99, 77)
    assert config.experts == ("a", "b") and config.priors == [0.5, 0.5]
