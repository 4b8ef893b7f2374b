"""A mixture of sparse FFN experts as a stock transformers MoE: configuration and tensors.

Llama and Mistral bases become a Mixtral, whose block is `Σ w_e · expert_e(x)` and whose
attention, norms, embeddings and head are theirs, so equal experts give the base's logits.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor
from transformers import GenerationConfig, MixtralConfig, PretrainedConfig

from moiety.errors import InputError
from moiety.experts.quantizer import PackedConfig

FAMILIES = ("llama", "mistral")
FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight(_mask)?")
EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)


def check_family(config: PretrainedConfig) -> None:
    """Raise InputError unless a stock MoE can hold finetunes of this architecture exactly."""
    if config.model_type not in FAMILIES:
        raise InputError(
            f"expected a base of type {' or '.join(FAMILIES)}, but it is {config.model_type}; "
            "no stock mixture is known here that would hold it exactly"
        )
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False):
            raise InputError(
                f"expected a base without biases, but its configuration has {field}: true; "
                "Mixtral has no place for biases, and dropping them would change the model"
            )


def mixture_config(
    base: PretrainedConfig, experts: Sequence[str], top_k: int, packed_pattern: str | None
) -> MixtralConfig:
    """The Mixtral configuration for `experts` of a base; `packed_pattern` None for dense ones.

    The experts' names are kept under `moiety`, so that a composite can name its own routes.
    """
    check_family(base)
    fields = {name: getattr(base, name) for name in SAME_FIELDS if hasattr(base, name)}
    config = MixtralConfig(
        **fields,
        sliding_window=getattr(base, "sliding_window", None),
        num_local_experts=len(experts),
        num_experts_per_tok=top_k,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.moiety = {"experts": list(experts)}
    if packed_pattern is not None:
        layers = range(config.num_hidden_layers)
        modules = [f"model.layers.{layer}.mlp.experts" for layer in layers]
        config.quantization_config = PackedConfig(pattern=packed_pattern, modules=modules)
    return config


def is_ffn(name: str) -> bool:
    """Whether a tensor of the base's architecture belongs to an expert."""
    return FFN.fullmatch(name) is not None


def mixture_tensors(
    shared: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    gates: Sequence[Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the mixture in the canonical per-expert layout.

    `shared` gives everything that is not an expert, `experts` the FFN matrices (dense, or packed
    with their masks), `gates` one weight (E, D) a layer. Every tensor of `shared` and every FFN
    tensor of the experts is used; InputError names one that has no place.
    """
    for name in shared:
        if is_ffn(name):
            continue
        if ".mlp." in name:
            raise InputError(f"expected FFN weights only, but {name} has no place in a mixture")
        yield name, shared[name]
    for number, expert in enumerate(experts):
        for name in expert:
            match = FFN.fullmatch(name)
            if match is not None:
                yield _expert_name(match, number), expert[name]
    for layer, gate_ED in enumerate(gates):
        yield f"model.layers.{layer}.block_sparse_moe.gate.weight", gate_ED


def _expert_name(match: re.Match[str], number: int) -> str:
    layer, matrix, mask = match[1], EXPERT_NAMES[match[2]], match[3] or ""
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{matrix}.weight{mask}"


def zero_gates(config: MixtralConfig, dtype: torch.dtype) -> list[Tensor]:
    """Gates that prefer no expert, one (E, D) a layer."""
    shape = (config.num_local_experts, config.hidden_size)
    return [torch.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]


def write_mixture(
    folder: Path,
    config: MixtralConfig,
    tensors: Iterator[tuple[str, Tensor]],
    tokenizer: Any,
    generation: GenerationConfig | None,
) -> None:
    """Write a checkpoint that `AutoModelForCausalLM.from_pretrained` opens."""
    state = {name: tensor.contiguous() for name, tensor in tensors}
    _check_complete(state, config)
    huggingface_hub.save_torch_state_dict(state, str(folder), safe_serialization=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation is not None:
        generation.save_pretrained(folder)


def _check_complete(state: Mapping[str, Tensor], config: MixtralConfig) -> None:
    for layer in range(config.num_hidden_layers):
        for number in range(config.num_local_experts):
            for matrix in EXPERT_NAMES.values():
                block = f"model.layers.{layer}.block_sparse_moe"
                name = f"{block}.experts.{number}.{matrix}.weight"
                if name not in state:
                    raise InputError(f"expected tensor {name}, but expert {number} has none")
