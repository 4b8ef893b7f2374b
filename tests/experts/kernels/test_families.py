"""Every stock mixture in transformers whose experts are gated: the same logits and tokens packed."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from moiety.errors import InputError
from moiety.experts import Pattern, pack
from moiety.experts.modules import SparseExperts
from moiety.experts.quantizer import replace_with_sparse

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GATED = [
    "Mixtral",
    "Qwen2Moe",
    "Qwen3Moe",
    "Olmoe",
    "Phimoe",
    "MiniMax",
    "Ernie4_5_Moe",
    "DeepseekV3",
]
EXTRA: dict[str, dict[str, Any]] = {
    "Olmoe": {"intermediate_size": 24},
    "DeepseekV3": {
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def tiny(family: str) -> PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(**SHAPE | EXTRA.get(family, {}))
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def experts_of(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj")
        if isinstance(module.gate_up_proj, nn.Parameter)
    ]


@torch.no_grad()
def pack_experts(model: PreTrainedModel, pattern: str) -> int:
    """Prune the experts' weights where they are, then put packed modules with them in place."""
    rule, names = Pattern.parse(pattern), experts_of(model)
    for name in names:
        stock = model.get_submodule(name)
        filled: dict[str, Tensor] = {}
        for attribute in ("gate_up_proj", "down_proj"):
            weight_EOI = stock.get_parameter(attribute)
            for matrix_OI in weight_EOI:
                matrix_OI *= rule.mask(matrix_OI.abs(), within="matrix")
            packed = [pack(matrix_OI, rule, "fp32") for matrix_OI in weight_EOI]
            filled[attribute] = torch.stack([one.values for one in packed])
            filled[f"{attribute}_mask"] = torch.stack([one.mask_OB for one in packed])
        sparse = replace_with_sparse(model, name, rule, "fp32")
        assert isinstance(sparse, SparseExperts)
        sparse.load_state_dict(filled, assign=True)
        sparse.prepare()
    return len(names)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("family", GATED)
def test_packed_experts_give_the_stock_results(family: str, pattern: str) -> None:
    stock, packed = tiny(family), tiny(family)
    assert pack_experts(packed, pattern) == pack_experts(stock, pattern) > 0
    dense = tiny(family)
    rule = Pattern.parse(pattern)
    with torch.no_grad():
        for name in experts_of(dense):
            for attribute in ("gate_up_proj", "down_proj"):
                for matrix_OI in dense.get_submodule(name).get_parameter(attribute):
                    matrix_OI *= rule.mask(matrix_OI.abs(), within="matrix")
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.inference_mode():
        ours, theirs = packed(ids).logits, dense(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    mask = torch.ones_like(ids)
    models: list[Any] = [packed, dense]
    tokens = [model.generate(ids, attention_mask=mask, **settings) for model in models]
    assert torch.equal(*tokens)


def test_experts_that_compute_something_else_are_refused() -> None:
    with torch.device("meta"):
        config = transformers.GptOssConfig(num_local_experts=4, num_hidden_layers=1)
        model = transformers.GptOssForCausalLM(config)
    message = "GptOssExperts has biases and transposed matrices and interleaved gates and a gate"
    with pytest.raises(InputError, match=message):
        replace_with_sparse(model, experts_of(model)[0], Pattern(2, 4))
