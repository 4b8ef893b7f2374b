"""A mixture of sparse FFN experts as a stock transformers MoE: configuration and tensors.

Llama and Mistral bases become a Mixtral, whose block is `Σ w_e · expert_e(x)` and whose
attention, norms, embeddings and head are theirs, so equal experts give the base's logits.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, MixtralConfig, PretrainedConfig

from moiety.errors import InputError
from moiety.experts.modules import check_fusable
from moiety.experts.quantizer import PackedConfig
from moiety.experts.shards import write_weights

FAMILIES = ("llama", "mistral")
FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight(_mask|_scale)?")
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
    base: PretrainedConfig, experts: Sequence[str], top_k: int, packed: PackedConfig | None
) -> MixtralConfig:
    """The Mixtral configuration for `experts` of a base; `packed` says how (None: dense ones).

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
    if packed is not None:
        for module in packed.modules:
            rows, columns = base.intermediate_size, base.hidden_size
            check_fusable(packed.pattern_of(module), packed.values, rows, columns)
        config.quantization_config = packed
    return config


def packed_mixture(layers: int, experts: Mapping[str, PackedConfig | None]) -> PackedConfig | None:
    """How the experts of a mixture are packed, from how each finetune is; None: not at all.

    One module holds a layer's experts, so they must share the pattern of that layer and the kind
    of values; InputError names two that differ.
    """
    kinds = {name: packed.values if packed else None for name, packed in experts.items()}
    _check_alike("the experts", "kind of values", kinds)
    patterns: dict[str, str] = {}
    for layer in range(layers):
        found = {
            f"{name}'s {matrix}": _pattern(packed, f"model.layers.{layer}.mlp.{matrix}")
            for name, packed in experts.items()
            for matrix in EXPERT_NAMES
        }
        _check_alike(f"the experts of layer {layer}", "pattern", found)
        if (pattern := next(iter(found.values()))) is not None:
            patterns[f"model.layers.{layer}.mlp.experts"] = pattern
    if not patterns:
        return None
    [(usual, _)] = Counter(patterns.values()).most_common(1)
    own = {module: pattern for module, pattern in patterns.items() if pattern != usual}
    kind = next(iter(kinds.values()))
    return PackedConfig(pattern=usual, modules=list(patterns), values=kind, patterns=own)


def _pattern(packed: PackedConfig | None, module: str) -> str | None:
    if packed is None or module not in packed.modules:
        return None
    return str(packed.pattern_of(module))


def _check_alike(what: str, quality: str, found: Mapping[str, str | None]) -> None:
    (first, one), *rest = found.items()
    for name, other in rest:
        if other != one:
            raise InputError(
                f"expected {what} to share one {quality}, because one module holds them all, but "
                f"{first} has {one or 'none'} and {name} has {other or 'none'}; prune them alike"
            )


def is_ffn(name: str) -> bool:
    """Whether a tensor of the base's architecture belongs to an expert."""
    return FFN.fullmatch(name) is not None


def mixture_tensors(
    shared: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    gates: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the mixture in the canonical per-expert layout.

    `shared` gives everything that is not an expert, `experts` the FFN matrices (dense, or packed
    with their masks and scales), `gates` the weights (E, D) by the names of the gates' modules.
    Every tensor of `shared` and every FFN tensor of the experts is used; InputError names one that has no place.
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
    for name, gate_ED in gates.items():
        yield name.replace(".mlp.gate.", ".block_sparse_moe.gate."), gate_ED


def _expert_name(match: re.Match[str], number: int) -> str:
    layer, matrix, suffix = match[1], EXPERT_NAMES[match[2]], match[3] or ""
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{matrix}.weight{suffix}"


def zero_gates(config: MixtralConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gates that prefer no expert, (E, D) each, by the names of their modules' weights."""
    shape = (config.num_local_experts, config.hidden_size)
    layers = range(config.num_hidden_layers)
    return {f"model.layers.{i}.mlp.gate.weight": torch.zeros(shape, dtype=dtype) for i in layers}


def write_mixture(
    folder: Path,
    config: MixtralConfig,
    tensors: Iterator[tuple[str, Tensor]],
    tokenizer: Any,
    generation: GenerationConfig | None,
) -> None:
    """Write a checkpoint that `AutoModelForCausalLM.from_pretrained` opens, one shard in memory.

    Raises InputError when an expert lacks a tensor.
    """
    written: set[str] = set()

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            written.add(name)
            yield name, tensor

    write_weights(folder, noted())
    _check_complete(written, config)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation is not None:
        generation.save_pretrained(folder)


def _check_complete(written: Set[str], config: MixtralConfig) -> None:
    for layer in range(config.num_hidden_layers):
        for number in range(config.num_local_experts):
            for matrix in EXPERT_NAMES.values():
                block = f"model.layers.{layer}.block_sparse_moe"
                name = f"{block}.experts.{number}.{matrix}.weight"
                if name not in written:
                    raise InputError(f"expected tensor {name}, but expert {number} has none")
