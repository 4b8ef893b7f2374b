"""Random packed matrices and models of every pattern and kind of values, for tests of the format."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from moiety.experts import Packed, Pattern, pack
from moiety.experts.architecture import Architecture
from moiety.experts.packing import LARGEST_CODE
from moiety.experts.quantizer import PackedConfig


def sparse(rows: int, columns: int, pattern: Pattern, seed: int = 0) -> Tensor:
    """A random matrix that follows a pattern."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    return weight * pattern.mask(weight.abs(), within="matrix")


def on_grid(weight: Tensor, values: str) -> tuple[Tensor, Tensor]:
    """The weight rounded to the integer grid of `values`, and its scales in bf16."""
    rows, columns = weight.shape
    groups = -(-columns // 128)
    padded = torch.zeros(rows, groups * 128)
    padded[:, :columns] = weight
    largest = padded.view(rows, groups, 128).abs().amax(-1).clamp_min(1e-3)
    scale = (largest * 1.01 / LARGEST_CODE[values]).bfloat16()
    spread = scale.float().repeat_interleave(128, dim=-1)[:, :columns]
    limit = LARGEST_CODE[values]
    return (weight / spread).round().clamp(-limit, limit) * spread, scale


def packed(
    rows: int, columns: int, pattern: str = "2:4", values: str = "bf16", seed: int = 0
) -> tuple[Tensor, Packed]:
    """A random matrix as its packed form says it, and that form."""
    return pruned(sparse(rows, columns, Pattern.parse(pattern), seed), pattern, values)


def pruned(weight: Tensor, pattern: str, values: str) -> tuple[Tensor, Packed]:
    """A matrix pruned by magnitude and rounded to `values`, dense and packed."""
    rule = Pattern.parse(pattern)
    mask, scale = rule.mask(weight.abs(), within="matrix"), None
    weight = weight * mask
    if values in LARGEST_CODE:
        weight, scale = on_grid(weight, values)
    one = pack(weight, rule, values, scale, mask)
    return one.dense(), one


def stacked(
    count: int, rows: int, columns: int, pattern: str = "2:4", values: str = "bf16"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A stack of random matrices: dense (E, rows, columns), then values, mask and scales."""
    both = [packed(rows, columns, pattern, values, seed) for seed in range(count)]
    scales = [one.scale_OG for _, one in both if one.scale_OG is not None]
    return (
        torch.stack([weight for weight, _ in both]),
        torch.stack([one.values for _, one in both]),
        torch.stack([one.mask_OB for _, one in both]),
        torch.stack(scales) if scales else None,
    )


def tiny_mixtral(**changes: Any) -> MixtralForCausalLM:
    """A random Mixtral with three experts."""
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **changes,
    }
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**settings)).eval()


def write_packed(
    model: PreTrainedModel,
    folder: Path,
    modules: Sequence[str],
    pattern: str,
    values: str,
    patterns: Mapping[str, str] | None = None,
) -> Path:
    """Write a model with `modules` packed to `folder/packed` and, the same, dense to `folder/dense`.

    Returns the packed one's folder.
    """
    model.save_pretrained(folder / "dense")
    tensors = load_file(folder / "dense" / "model.safetensors")
    stored = dict(tensors)
    config = PackedConfig(pattern=pattern, modules=modules, values=values, patterns=patterns)
    for module in modules:
        for name in Architecture(model.config).matrices(module):
            rule = str(config.pattern_of(module))
            dense, one = pruned(tensors[name].float(), rule, values)
            tensors[name] = dense.to(tensors[name].dtype)
            stored |= one.tensors(name)
    save_file(tensors, folder / "dense" / "model.safetensors", {"format": "pt"})
    shutil.copytree(folder / "dense", folder / "packed")
    save_file(stored, folder / "packed" / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "dense" / "config.json").read_text())
    described["quantization_config"] = config.to_dict()
    (folder / "packed" / "config.json").write_text(json.dumps(described))
    return folder / "packed"


EXPERTS = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
LINEARS = [
    f"model.layers.{layer}.{name}_proj"
    for layer in range(2)
    for name in ("mlp.gate", "mlp.up", "mlp.down", "self_attn.q", "self_attn.o")
]
