"""Finetunes given as adapters: merged exactly, once, and refused when they do not fit."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.source import resolve

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(world: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(world.base)


def adapt(base: Path, out: Path, kind: Any, tokens: int = 0, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if tokens:
        model.resize_token_embeddings(model.config.vocab_size + tokens)
    adapted = get_peft_model(model, kind)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "modules_to_save" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(out)
    return adapted.eval()


@pytest.fixture(scope="module")
def adapter(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "lora"
    adapt(world.base, out, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23).reshape(2, 10)).logits


def test_a_full_model_is_its_own_folder(world: Any, tmp_path: Path) -> None:
    assert resolve(world.base, tmp_path / "work", base="ignored") == world.base
    assert not (tmp_path / "work").exists()


def test_an_adapter_is_merged_once_into_the_base_it_names(
    world: Any, adapter: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = adapt(world.base, tmp_path / "same", config)
    folder = resolve(adapter, tmp_path / "work")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == world.tokenizer.get_vocab()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(adapter), tmp_path / "work", base=world.base) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_the_name_follows_the_contents_of_both(world: Any, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(world.base, tmp_path / "moved")
    first = resolve(adapter, tmp_path / "one")
    same = resolve(adapter, tmp_path / "two", base=tmp_path / "moved")
    other = resolve(adapter, tmp_path / "two", base=world.finetunes["letters"])
    assert first.name == same.name != other.name
    for file in sorted(path.name for path in first.iterdir()):
        assert (first / file).read_bytes() == (same / file).read_bytes(), file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_keeps_the_dtype_of_the_base(
    world: Any, base: Any, adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    half = AutoModelForCausalLM.from_pretrained(world.base, dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    world.tokenizer.save_pretrained(tmp_path / "half")
    merged = Checkpoint(resolve(adapter, tmp_path / "work", base=tmp_path / "half"))
    full = Checkpoint(resolve(adapter, tmp_path / "work", base=world.base))
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    for name in merged:
        torch.testing.assert_close(merged[name].float(), full[name], rtol=1e-2, atol=1e-3)


def test_an_adapter_with_tokens_of_its_own(world: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = adapt(world.base, tmp_path / "lora", config, tokens=2)
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    tokenizer.save_pretrained(tmp_path / "lora")
    folder = resolve(tmp_path / "lora", tmp_path / "work")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.config.vocab_size == len(world.tokenizer) + 2
    assert len(AutoTokenizer.from_pretrained(folder)) == merged.config.vocab_size
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["embed_tokens", "norm"], "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "embed_tokens"], "tokens": 2},
    ],
)
def test_adapted_embeddings_and_norms(world: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    tokens = changes.pop("tokens", 0)
    fields = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes}
    adapted = adapt(world.base, tmp_path / "lora", LoraConfig(**fields), tokens)
    merged = AutoModelForCausalLM.from_pretrained(resolve(tmp_path / "lora", tmp_path / "work"))
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model_name_or_path": "/no/such/base"}, "base of the adapter .*/no/such/base"),
        ({"base_model_name_or_path": None}, "name its base"),
        ({"peft_type": None}, "peft_type"),
        ({"peft_type": "NEW_KIND"}, "NEW_KIND"),
        ({"task_type": "SEQ_CLS"}, "causal language model.*SEQ_CLS"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"no place for .*down_proj"),
        ({"target_modules": [*TARGETS, "k_proj"]}, r"also needs .*k_proj"),
        ({"r": 8}, "cannot be merged"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    adapter: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(adapter, folder)
    change(folder, **fields)
    with pytest.raises(InputError, match=message) as caught:
        resolve(folder, tmp_path / "work")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "work").glob("*"))


def test_weights_that_cannot_be_read_are_refused(
    world: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(adapter, folder)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, weights)
    with pytest.raises(InputError, match="NaN"):
        resolve(folder, tmp_path / "work")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="safetensors file at"):
        resolve(folder, tmp_path / "work")
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="only safetensors adapters"):
        resolve(folder, tmp_path / "work")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="install peft"):
        resolve(folder, tmp_path / "work")


def test_prompt_tuning_and_quantised_bases_are_refused(
    world: Any, adapter: Path, tmp_path: Path
) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapt(world.base, tmp_path / "prompt", prompt)
    with pytest.raises(InputError, match=r"merged into weights.*PROMPT_TUNING"):
        resolve(tmp_path / "prompt", tmp_path / "work")
    quantised = tmp_path / "quantised"
    shutil.copytree(world.base, quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="full-precision base"):
        resolve(adapter, tmp_path / "work", base=quantised)
