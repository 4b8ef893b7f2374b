"""Memory beside the weights: the key-value cache, and what a forward pass holds meanwhile.

T tokens, D model width, F expert width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

from transformers.cache_utils import CacheLayerMixin, DynamicCache

from moiety.errors import InputError

CACHE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}


def cache_bytes(config: Any, context: int, batch: int, dtype: str = "bf16") -> int:
    """Bytes of the keys and values of `batch` sequences of `context` tokens.

    Layers, their kinds and their windows are those of transformers' own cache: sliding layers
    keep one token less than their window, layers with a recurrent state nothing here, DeepSeek's
    latent attention the latent and the rotated keys. Raises InputError for an unknown `dtype`.
    """
    if dtype not in CACHE_BYTES:
        raise InputError(f"cache must be one of {', '.join(CACHE_BYTES)}, but it is {dtype!r}")
    kept = sum(min(context, window) for window in _windows(config, context))
    return round(kept * batch * _elements(config) * CACHE_BYTES[dtype])


def _windows(config: Any, context: int) -> Iterator[int]:
    for layer in DynamicCache(config=config).layers:
        if getattr(layer, "is_sliding", False):
            yield max(1, int(getattr(layer, "sliding_window", context)) - 1)
        elif isinstance(layer, CacheLayerMixin):
            yield context


def _elements(config: Any) -> int:
    """Numbers kept for one token of one layer."""
    if latent := getattr(config, "kv_lora_rank", None):
        return latent + config.qk_rope_head_dim
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * heads * head_width(config)


def head_width(config: Any) -> int:
    """Features of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def activation_bytes(config: Any, tokens: int, context: int, batch: int, word: int = 2) -> int:
    """Bytes that a forward pass over `tokens` tokens of each sequence holds at its peak.

    Attention holds the residual stream, its norm, queries, keys and values before and after
    rotation, and its output; the FFN the residual stream, its norm and three tensors of its
    width. A mask takes a byte for each pair of a token and one of the `context`. Scores are not
    held (fused attention), logits only of each sequence's last token, once as they are and once
    in fp32.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    queries = heads * head_width(config)
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head_width(config)
    attention = 2 * width + 3 * queries + 3 * keys
    block = max(attention, 2 * width + _ffn(config))
    logits = config.vocab_size * (word + 4)
    return batch * (tokens * (block * word + context) + logits)


def _ffn(config: Any) -> int:
    """Numbers that an FFN, or the active experts of a token, hold for it."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    chosen = getattr(config, "num_experts_per_tok", None)
    if not chosen:
        return 3 * int(inner)
    inner = getattr(config, "moe_intermediate_size", None) or inner
    return int(chosen) * (3 * int(inner) + 2 * int(config.hidden_size))
