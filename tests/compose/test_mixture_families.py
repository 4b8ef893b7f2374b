"""Which dense models become a mixture: nothing of a configuration is dropped, the rest refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from moiety.compose import Recipe, build, open_composite, route
from moiety.compose.account import folded
from moiety.compose.mixture import (
    check_mixture,
    layout_of,
    mixture_config,
    mixture_tensors,
    write_mixture,
    zero_gates,
)
from moiety.compose.mixture.families import HOLDERS
from moiety.compose.mixture.fields import CARRIED
from moiety.compose.recipe import Route
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.modules import SparseExperts
from moiety.files import read_json

YARN = {
    "rope_type": "yarn",
    "rope_theta": 3e4,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
}
ODD: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_act": "gelu",
    "max_position_embeddings": 128,
    "initializer_range": 0.07,
    "rms_norm_eps": 3e-4,
    "rope_parameters": YARN,
    "attention_dropout": 0.2,
    "tie_word_embeddings": True,
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
    "pad_token_id": 8,
    "use_cache": False,
    "head_dim": 16,
    "dtype": torch.bfloat16,
}


@pytest.mark.parametrize("dense", HOLDERS)
def test_every_field_that_means_the_same_is_carried_over(dense: str, tmp_path: Path) -> None:
    assert set(ODD) == set(CARRIED)
    config = AutoConfig.for_model(dense, **ODD)
    for layers in ("all", [1]):
        if layers != "all" and dense in ("olmo2", "granite"):
            continue
        if (dense, layers) == ("mistral", [1]):
            config.sliding_window = None
        mixture = mixture_config(layout_of(config, layers), ["a", "b"], 1, None)
        mixture.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        for name, value in ODD.items():
            assert getattr(mixture, name) == getattr(again, name) == value, name
        assert again.num_experts_per_tok == 1 and again.moiety == {"experts": ["a", "b"]}
        assert getattr(again, "norm_topk_prob", True)
        assert (
            again.sliding_window == 4096
            if mixture.model_type == "mixtral" and (dense == "mistral")
            else not getattr(again, "sliding_window", None)
        )


REFUSED: dict[str, tuple[PretrainedConfig, Any, str]] = {
    "mlp biases": (LlamaConfig(mlp_bias=True), "all", "biases in its FFN .mlp_bias"),
    "granite mlp biases": (GraniteConfig(mlp_bias=True), "all", "biases in its FFN"),
    "o bias": (LlamaConfig(attention_bias=True), [0], "no bias on attention's output"),
    "mistral window": (MistralConfig(sliding_window=8), [0], "sliding window on to every kernel"),
    "olmo layers": (Olmo2Config(), [0], "flex_olmo: all layers have experts in it"),
    "granite layers": (GraniteConfig(), [1], "granitemoe: all layers have experts in it"),
    "qwen2 window": (
        Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=0),
        "all",
        "sliding window on to every kernel",
    ),
    "qwen3 windows": (
        Qwen3Config(use_sliding_window=True, sliding_window=8, max_window_layers=2),
        "all",
        "sliding window in all layers or in none",
    ),
    "gemma2": (Gemma2Config(), "all", "llama, .*, but it is gemma2; .*Gemma's norms"),
    "phi3": (Phi3Config(), "all", "Phi-3's fused gate_up_proj"),
    "gpt2": (GPT2Config(), "all", "it is gpt2; .*FFN without a gate"),
    "stablelm": (AutoConfig.for_model("stablelm"), "all", "no stock mixture is known"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_mixture_holds_is_refused_with_the_reason(name: str) -> None:
    config, layers, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason) as caught:
        check_mixture(config, layers)
    assert "kind: routed" in str(caught.value)


def llama(**fields: Any) -> PretrainedConfig:
    return LlamaConfig(**fields)


def test_fields_that_no_family_knows_are_refused_never_dropped() -> None:
    for field, value in (("chunk_size_feed_forward", 8), ("is_encoder_decoder", True)):
        with pytest.raises(InputError, match=f"its {field} is {value}, for which there is no pl"):
            check_mixture(llama(**{field: value}))
    check_mixture(llama(pretraining_tp=4, num_labels=7, output_hidden_states=True))


def test_fields_that_transformers_would_read_in_the_mixture_are_refused() -> None:
    window = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 32}
    for field, value in window.items():
        with pytest.raises(
            InputError, match=f"its {field} is .*, which mixtral would read otherwise"
        ):
            check_mixture(llama(**{field: value}))
    check_mixture(llama(sliding_window=None, made_by="someone"))


def test_layers_are_checked() -> None:
    config = LlamaConfig(num_hidden_layers=3)
    for layers, reason in (([0, 3, 7], r"within 0\.\.2.* but it has 3, 7"), ([], "at least one")):
        with pytest.raises(InputError, match=f"compose.layers must be .*{reason}"):
            check_mixture(config, layers)
    assert layout_of(config, [2, 0, 1]).family.model_class == "MixtralForCausalLM"
    assert layout_of(config, [2, 0, 2]).layers == (0, 2)


def test_missing_and_packed_tensors_are_named(world: Any, tmp_path: Path) -> None:
    base = Checkpoint(world.base)
    layout = layout_of(base.config, [1])
    gates = zero_gates(layout, 2, torch.float32)
    up, own = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (1, 0))
    without = {name: base[name] for name in base if name != up}
    with pytest.raises(InputError, match=f"expected tensor {up}, but expert 1 has none"):
        list(mixture_tensors(layout, base, [base, without], gates))
    packed = {**dict(base), f"{own}_mask": torch.zeros(1)}
    with pytest.raises(InputError, match=f"dense shared part, but {own} in it is packed"):
        list(mixture_tensors(layout, packed, [base, base], gates))
    config = mixture_config(layout, ["a", "b"], 1, None)
    shared = {name: base[name] for name in base if name != own}
    tensors = mixture_tensors(layout, shared, [base, base], gates)
    with pytest.raises(InputError, match=f"expected tensor {own} in the mixture"):
        write_mixture(tmp_path, config, tensors, world.tokenizer, None)
    extra = [*mixture_tensors(layout, base, [base, base], gates), ("extra", torch.zeros(1))]
    with pytest.raises(InputError, match="expected no tensor extra"):
        write_mixture(tmp_path, config, iter(extra), world.tokenizer, None)


def test_equal_layers_are_folded_in_the_report() -> None:
    names = [f"model.layers.{layer}.up" for layer in (7, 0, 1, 2, 10, 11)]
    assert folded([*names, "model.norm"]) == ["model.layers.{0-2,7,10-11}.up", "model.norm"]


def test_chosen_layers_build_route_and_open(world: Any, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(world.recipe(compose={"layers": [1], "shared": "soup"}))
    report = build(recipe, tmp_path / "out")
    model = open_composite(tmp_path / "out").model
    packed = [name for name, m in model.named_modules() if isinstance(m, SparseExperts)]
    assert packed == ["model.layers.1.mlp.experts"]
    assert model.config.mlp_only_layers == [0]
    soup = sum(Checkpoint(folder)[up] for folder in world.finetunes.values()) / 3
    torch.testing.assert_close(model.get_parameter(up), soup)
    tensors = read_json(tmp_path / "out" / "build.json")["facts"]["tensors"]
    assert "model.layers.{0}.mlp.up_proj.weight" in tensors["shared"]
    assert "model.layers.{0}.mlp.up_proj.weight" in tensors["experts"]["letters"]["merged"]
    assert "model.layers.{1}.mlp.up_proj.weight" in tensors["experts"]["letters"]["used"]
    assert report.facts["architecture"] == "Qwen2MoeForCausalLM"
    before = Checkpoint(tmp_path / "out")
    old = {name: before[name] for name in before}
    data = {name: texts["calibration"] for name, texts in world.texts.items()}
    settings = Route(init="centroid", train_steps=2)
    assert route(tmp_path / "out", data, settings, context_length=32).parameters == 3 * 32
    after = Checkpoint(tmp_path / "out")
    changed = [name for name in after if not torch.equal(after[name], old[name])]
    assert changed == ["model.layers.1.mlp.gate.weight"]


up = "model.layers.0.mlp.up_proj.weight"
