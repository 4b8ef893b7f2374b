"""Pruning every family of models that is built of linear layers, in every form of checkpoint."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moiety.errors import InputError
from moiety.experts import PruneSettings, prune
from moiety.experts.checkpoint import INDEX, Checkpoint
from moiety.experts.methods import relative_error
from moiety.experts.modules import SparseLinear
from moiety.experts.unpack import dense_view
from moiety.text import token_windows

SETTINGS = PruneSettings(sites="all", context_length=32, windows=8)
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, **SLIDING},
    "gemma3_text": {"head_dim": 8, **SLIDING},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "stablelm": {},
    "gpt_neox": {},
    "gptj": {**GPT2_SIZES, "rotary_dim": 8},
    "gpt_bigcode": GPT2_SIZES,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "falcon": {},
    "starcoder2": {},
    "cohere": {},
    "cohere2": SLIDING,
    "granite": {},
    "glm4": {"head_dim": 8},
    "smollm3": {},
    "nemotron": {"head_dim": 8},
    "exaone4": SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def build(family: str, vocabulary: int, **changes: Any) -> Any:
    """A random model of a family, with biases and norms that are not what they start as."""
    fields = {**COMMON, "vocab_size": vocabulary, **FAMILIES.get(family, {}), **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save(model: Any, world: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    world.tokenizer.save_pretrained(folder)
    return folder


def text_of(world: Any) -> list[str]:
    """One long document: its windows are the same however documents are put together."""
    files = [path["calibration"].read_text() for path in world.texts.values()]
    return [" ".join(re.findall(r"[a-z]{2,}", " ".join(files)))]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43).reshape(2, 20), use_cache=False).logits


@torch.no_grad()
def put(model: nn.Module, tensors: Any, names: list[str]) -> None:
    for name in names:
        model.get_submodule(name).get_parameter("weight").copy_(tensors[f"{name}.weight"])


@torch.no_grad()
def grams_of(model: Any, names: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gram matrices of the layers' inputs in a plain forward pass of the whole model."""
    grams: dict[str, torch.Tensor] = {}
    handles = []
    for name in names:

        def listen(_module: nn.Module, inputs: Any, name: str = name) -> None:
            rows = inputs[0].flatten(0, -2)
            grams[name] = rows.T @ rows

        handles.append(model.get_submodule(name).register_forward_pre_hook(listen))
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return grams


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_pruned_and_opens_again(world: Any, tmp_path: Path, family: str) -> None:
    folder = save(build(family, len(world.tokenizer)), world, tmp_path / "dense")
    text = text_of(world)
    report = prune(folder, tmp_path / "packed", text, SETTINGS)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    twin = AutoModelForCausalLM.from_pretrained(folder).eval()
    before = logits(twin)
    names = list(linears(twin))
    assert [n for n, m in packed.named_modules() if isinstance(m, SparseLinear)] == names
    tensors = dense_view(tmp_path / "packed")
    assert set(tensors.packed) == {f"{name}.weight" for name in names}

    first = [name for name in names if re.search(r"\.0\.", name)]
    second = [name for name in names if name not in first]
    dense = {name: module.weight.detach().clone() for name, module in linears(twin).items()}
    put(twin, tensors, first)
    windows = token_windows(world.tokenizer, text, 32, 8)
    grams = grams_of(twin, second, windows.ids_WC)
    errors = {matrix.name: matrix.errors["stored"] for matrix in report.matrices}
    for name in second:
        stored = tensors[f"{name}.weight"].float()
        expected = relative_error(dense[name], stored, grams[name])
        assert errors[name] == pytest.approx(expected, rel=0.01), name

    put(twin, tensors, second)
    torch.testing.assert_close(logits(packed), logits(twin), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(packed), before, atol=1e-3)


def test_models_without_linear_layers_are_refused(world: Any, tmp_path: Path) -> None:
    model = build("gpt2", len(world.tokenizer), **GPT2_SIZES)
    folder = save(model, world, tmp_path / "dense")
    with pytest.raises(InputError, match="linear layers"):
        prune(folder, tmp_path / "packed", text_of(world), SETTINGS)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("values", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_a_checkpoint_stays(
    world: Any, tmp_path: Path, dtype: torch.dtype, values: str
) -> None:
    folder = save(build("llama", len(world.tokenizer)).to(dtype), world, tmp_path / "dense")
    settings = PruneSettings(sites="all", context_length=32, windows=8, values=values)
    prune(folder, tmp_path / "packed", text_of(world), settings)
    source, packed = Checkpoint(folder), Checkpoint(tmp_path / "packed")
    view = dense_view(tmp_path / "packed")
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name in source:
        if name in view.packed:
            assert packed[name].dtype == kinds[values]
        else:
            assert packed[name].dtype == dtype and torch.equal(packed[name], source[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto").eval()
    assert model.get_input_embeddings().weight.dtype == dtype
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    put(twin, view, list(linears(twin)))
    close = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(model).float(), logits(twin), rtol=close, atol=close)


@pytest.mark.parametrize("tied", [True, False])
def test_shards_and_tied_embeddings(world: Any, tmp_path: Path, tied: bool) -> None:
    model = build("llama", len(world.tokenizer), tie_word_embeddings=tied)
    whole = save(model, world, tmp_path / "whole")
    parts = save(model, world, tmp_path / "parts", max_shard_size="20KB")
    assert (parts / INDEX).is_file() and not (whole / INDEX).exists()
    for folder in (whole, parts):
        prune(folder, tmp_path / f"packed-{folder.name}", text_of(world), SETTINGS)
    one, other = Checkpoint(tmp_path / "packed-whole"), Checkpoint(tmp_path / "packed-parts")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert ("lm_head.weight" in one) == (not tied)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed-parts")
    assert (opened.lm_head.weight is opened.get_input_embeddings().weight) == tied
