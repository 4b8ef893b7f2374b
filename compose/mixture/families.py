"""The stock mixtures: what each can hold exactly, and where it keeps experts and gates.

A dense model fits if the mixture's attention, norms, rotary embeddings, embeddings and head compute
what its own do, so that a mixture of equal experts gives its logits. Found by reading the modeling
files of transformers 5; the tests hold every pair to it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    FlexOlmoConfig,
    GraniteMoeConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

LAYER = "model.layers.{layer}"
BIASES = "biases in its FFN (mlp_bias)"


class Unfit(Exception):
    """Why a mixture cannot hold a dense model exactly."""


@dataclass(frozen=True)
class Places:
    """Names of a mixture's parts, with `{layer}` and `{expert}` to be filled in.

    `gate` and `experts` are a weight and a module in memory; `stored_gate` and `stored` are names
    on disk. A stored tensor holds the named matrices of one expert, one above the other, or the
    stack of all experts' where its name has no `{expert}`.
    """

    gate: str
    stored_gate: str
    experts: str
    stored: Mapping[str, Sequence[str]]


Fit = Callable[[PretrainedConfig, Sequence[int]], dict[str, Any]]
"""`(dense, layers with experts)` to the fields that are not merely carried; raises Unfit."""


@dataclass(frozen=True)
class Family:
    """One stock mixture: its configuration, its causal language model, where its parts stand.

    `looked_at` are the fields of dense models that `fit` reads; `experts` is its own word for how
    many there are. `neutral` are stored tensors of zeros, by name with their shapes in the
    dense model's fields, that every layer with experts needs and that add exactly nothing.
    """

    config_class: type[PretrainedConfig]
    model_class: str
    places: Places
    looked_at: frozenset[str]
    fit: Fit
    experts: str
    neutral: Mapping[str, Sequence[str | int]] = field(default_factory=dict)


def refuse(reasons: Mapping[str, bool]) -> None:
    """Raise Unfit with every reason that holds."""
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise Unfit(" and ".join(found))


def _some_dense(dense: PretrainedConfig, layers: Sequence[int]) -> bool:
    return len(layers) < dense.num_hidden_layers


def _dense_layers(dense: PretrainedConfig, layers: Sequence[int]) -> list[int]:
    return [layer for layer in range(dense.num_hidden_layers) if layer not in layers]


def _windows(dense: PretrainedConfig) -> list[bool]:
    """Whether the attention of each layer looks at a sliding window only."""
    window = getattr(dense, "sliding_window", None) is not None
    types = getattr(dense, "layer_types", None)
    if types is None:
        return [window] * dense.num_hidden_layers
    return [window and kind == "sliding_attention" for kind in types]


def _has(dense: PretrainedConfig, name: str) -> bool:
    return bool(getattr(dense, name, False))


EVERY_LAYER = "all layers have experts in it"


def _mixtral(dense: PretrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    refuse(
        {
            EVERY_LAYER: _some_dense(dense, layers),
            "it has no biases in attention (attention_bias)": _has(dense, "attention_bias"),
            f"it has no {BIASES}": _has(dense, "mlp_bias"),
        }
    )
    return {"sliding_window": getattr(dense, "sliding_window", None)}


def _qwen2_moe(dense: PretrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    refuse(
        {
            "it has no bias on attention's output (attention_bias)": _has(dense, "attention_bias"),
            f"it has no {BIASES}": _has(dense, "mlp_bias"),
            "its attention does not hand a sliding window on to every kernel": any(_windows(dense)),
        }
    )
    return {
        "qkv_bias": dense.model_type == "qwen2",
        "layer_types": ["full_attention"] * dense.num_hidden_layers,
        "use_sliding_window": False,
        "mlp_only_layers": _dense_layers(dense, layers),
        "decoder_sparse_step": 1,
        "moe_intermediate_size": dense.intermediate_size,
        "shared_expert_intermediate_size": 1,
        "norm_topk_prob": True,
    }


def _qwen3_moe(dense: PretrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    windows = _windows(dense)
    reason = "it has a sliding window in all layers or in none"
    refuse({reason: any(windows) and not all(windows)})
    return {
        "attention_bias": getattr(dense, "attention_bias", False),
        "use_sliding_window": all(windows),
        "sliding_window": getattr(dense, "sliding_window", None) if all(windows) else None,
        "mlp_only_layers": _dense_layers(dense, layers),
        "decoder_sparse_step": 1,
        "moe_intermediate_size": dense.intermediate_size,
        "norm_topk_prob": True,
    }


def _flex_olmo(dense: PretrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    refuse({EVERY_LAYER: _some_dense(dense, layers)})
    return {"attention_bias": getattr(dense, "attention_bias", False), "norm_topk_prob": True}


MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def _granite_moe(dense: PretrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    refuse(
        {
            EVERY_LAYER: _some_dense(dense, layers),
            f"it has no {BIASES}": _has(dense, "mlp_bias"),
        }
    )
    width = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    return {
        **{name: getattr(dense, name, 1.0) for name in MULTIPLIERS},
        "attention_multiplier": getattr(dense, "attention_multiplier", width**-0.5),
        "attention_bias": getattr(dense, "attention_bias", False),
    }


WINDOW_FIELDS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
PER_EXPERT = Places(
    gate=f"{LAYER}.mlp.gate.weight",
    stored_gate=f"{LAYER}.mlp.gate.weight",
    experts=f"{LAYER}.mlp.experts",
    stored={
        f"{LAYER}.mlp.experts.{{expert}}.{matrix}.weight": (matrix,)
        for matrix in ("gate_proj", "up_proj", "down_proj")
    },
)
MIXTRAL = Family(
    MixtralConfig,
    "MixtralForCausalLM",
    Places(
        gate=f"{LAYER}.mlp.gate.weight",
        stored_gate=f"{LAYER}.block_sparse_moe.gate.weight",
        experts=f"{LAYER}.mlp.experts",
        stored={
            f"{LAYER}.block_sparse_moe.experts.{{expert}}.{name}.weight": (matrix,)
            for name, matrix in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
        },
    ),
    frozenset({"attention_bias", "mlp_bias", "sliding_window"}),
    _mixtral,
    "num_local_experts",
)
QWEN2_MOE = Family(
    Qwen2MoeConfig,
    "Qwen2MoeForCausalLM",
    PER_EXPERT,
    frozenset({"attention_bias", "mlp_bias", *WINDOW_FIELDS}),
    _qwen2_moe,
    "num_experts",
    neutral={
        f"{LAYER}.mlp.shared_expert.gate_proj.weight": (1, "hidden_size"),
        f"{LAYER}.mlp.shared_expert.up_proj.weight": (1, "hidden_size"),
        f"{LAYER}.mlp.shared_expert.down_proj.weight": ("hidden_size", 1),
        f"{LAYER}.mlp.shared_expert_gate.weight": (1, "hidden_size"),
    },
)
QWEN3_MOE = Family(
    Qwen3MoeConfig,
    "Qwen3MoeForCausalLM",
    PER_EXPERT,
    frozenset({"attention_bias", *WINDOW_FIELDS}),
    _qwen3_moe,
    "num_experts",
)
FLEX_OLMO = Family(
    FlexOlmoConfig,
    "FlexOlmoForCausalLM",
    PER_EXPERT,
    frozenset({"attention_bias"}),
    _flex_olmo,
    "num_experts",
)
GRANITE_MOE = Family(
    GraniteMoeConfig,
    "GraniteMoeForCausalLM",
    Places(
        gate=f"{LAYER}.block_sparse_moe.router.weight",
        stored_gate=f"{LAYER}.block_sparse_moe.router.layer.weight",
        experts=f"{LAYER}.block_sparse_moe.experts",
        stored={
            f"{LAYER}.block_sparse_moe.input_linear.weight": ("gate_proj", "up_proj"),
            f"{LAYER}.block_sparse_moe.output_linear.weight": ("down_proj",),
        },
    ),
    frozenset({"attention_bias", "mlp_bias", "attention_multiplier", *MULTIPLIERS}),
    _granite_moe,
    "num_local_experts",
)
HOLDERS: Mapping[str, Sequence[Family]] = {
    "llama": (MIXTRAL, QWEN2_MOE, GRANITE_MOE),
    "mistral": (MIXTRAL, QWEN2_MOE),
    "qwen2": (QWEN2_MOE,),
    "qwen3": (QWEN3_MOE,),
    "olmo2": (FLEX_OLMO,),
    "granite": (GRANITE_MOE,),
}
"""Mixtures that may hold an architecture, the most widely read ones first."""
WHY_NOT: Mapping[str, str] = {
    "gemma": "Gemma's norms and scaled embeddings",
    "gemma2": "Gemma's norms around each FFN",
    "gemma3_text": "Gemma's norms around each FFN",
    "gpt2": "an FFN without a gate, with biases",
    "gpt_neox": "an FFN without a gate, with biases",
    "olmo3": "OLMo 3's layers of two kinds of attention",
    "phi": "an FFN without a gate, with biases",
    "phi3": "Phi-3's fused gate_up_proj and qkv_proj",
    "smollm3": "SmolLM3's layers without rotary embeddings",
}
"""What no stock mixture has, for architectures that users are likely to try."""
