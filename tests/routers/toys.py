"""Tiny random mixtures of experts, and text whose domains their gates can tell apart."""

from typing import Any

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moiety.text import Windows

VOCABULARY, WIDTH, EXPERTS = 64, 32, 4
OWN = {"law": 2, "code": 0, "poems": 3}


def mixtral(seed: int = 0, active: int = 2, layers: int = 2, **changes: Any) -> PreTrainedModel:
    """A Mixtral with planted domains: see `plant`."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        **_common(layers), num_local_experts=EXPERTS, num_experts_per_tok=active, **changes
    )
    return plant(MixtralForCausalLM(config))


def qwen(seed: int = 0) -> PreTrainedModel:
    """A Qwen3-MoE."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **_common(2), num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=16
    )
    return Qwen3MoeForCausalLM(config)


def olmoe(seed: int = 0, active: int = 2) -> PreTrainedModel:
    """An OLMoE, whose gates do not renormalise the chosen weights."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        **_common(2), num_experts=EXPERTS, num_experts_per_tok=active, norm_topk_prob=False
    )
    return OlmoeForCausalLM(config)


def _common(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def plant(model: PreTrainedModel) -> PreTrainedModel:
    """Make domains that gates can tell apart, and experts that know one domain each.

    The tokens of each quarter of the vocabulary share a direction, in and out; the own expert of
    a quarter writes its direction, and expert 1 that of the quarter without a domain.
    """
    tensors = model.state_dict()
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name].normal_(std=0.1)
            for quarter in range(4):
                tensors[name][quarter * 16 : quarter * 16 + 16, quarter] += 1.0
        for name, tensor in tensors.items():
            if name.endswith("experts.gate_up_proj"):
                tensor[:, ::16, :4] = 1.0
            if name.endswith("experts.down_proj"):
                for quarter, expert in enumerate((1, *OWN.values())):
                    tensor[expert, quarter, 0] = 0.3
    return model.eval()


def windows(quarter: int, count: int, length: int = 12, seed: int = 0) -> Windows:
    """Random tokens of one quarter of the vocabulary, the windows of different lengths."""
    generator = torch.Generator().manual_seed(100 * seed + quarter)
    ids_WC = torch.randint(0, 16, (count, length), generator=generator) + 16 * quarter
    lengths_W = torch.randint(length // 2, length + 1, (count,), generator=generator)
    lengths_W[0] = length
    mask_WC = (torch.arange(length) < lengths_W[:, None]).long()
    return Windows(
        ids_WC=ids_WC * mask_WC,
        mask_WC=mask_WC,
        document_W=torch.arange(count),
        bytes_W=lengths_W,
    )


def domains(count: int = 24, length: int = 12, seed: int = 0) -> dict[str, Windows]:
    """Text of the domains of `OWN`."""
    return {name: windows(at, count, length, seed) for at, name in enumerate(OWN, start=1)}
