"""Tiny packed models to recover, made from the world's finetunes without calibration."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM

from moiety.experts.checkpoint import Checkpoint
from moiety.experts.packing import pack
from moiety.experts.pattern import Pattern
from moiety.experts.quantizer import PackedConfig
from moiety.experts.recovery import DistillSettings, LoraSettings
from moiety.experts.shards import write_weights

FAST: dict[str, Any] = {
    "context_length": 32,
    "windows": 40,
    "held_every": 4,
    "batch_size": 4,
    "micro_batch": 4,
    "steps": 12,
    "eval_every": 4,
}
DISTILL = DistillSettings(**FAST, rate=0.02)
LORA = LoraSettings(**FAST, rate=0.01, rank=4, alpha=8)


def pack_model(
    dense: Path, out: Path, pattern: str = "2:4", values: str = "bf16", part: str = ".layers."
) -> Path:
    """Magnitude-prune the linear layers of a dense model whose names hold `part`; gives `out`."""
    shutil.copytree(dense, out)
    checkpoint, rule = Checkpoint(dense), Pattern.parse(pattern)
    modules = [
        name.removesuffix(".weight")
        for name in checkpoint
        if name.endswith("_proj.weight") and part in name
    ]
    tensors: dict[str, Tensor] = {}
    for name in checkpoint:
        weight = checkpoint[name]
        if name.removesuffix(".weight") not in modules:
            tensors[name] = weight
            continue
        mask = rule.mask(weight.abs(), within="matrix")
        tensors |= pack(weight * mask, rule, values, mask_OI=mask).tensors(name)
    write_weights(out, sorted(tensors.items()))
    config = json.loads((out / "config.json").read_text())
    packed = PackedConfig(pattern=pattern, modules=modules, values=values)
    config["quantization_config"] = packed.to_dict()
    (out / "config.json").write_text(json.dumps(config))
    return out


def state(model: Path) -> dict[str, Tensor]:
    """Every stored tensor."""
    checkpoint = Checkpoint(model)
    return {name: checkpoint[name] for name in checkpoint}


def opened(model: Path) -> Any:
    """The model as anybody opens it."""
    return AutoModelForCausalLM.from_pretrained(model)
