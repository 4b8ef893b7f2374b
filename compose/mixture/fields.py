"""What of a dense model's configuration a mixture takes over, and what must not be lost.

Every field that the dense configuration class declares is carried, looked at by the family that
holds it, without meaning for what is computed, or must have its default value. A field that a
later transformers adds is therefore refused as soon as a model uses it, never dropped.
"""

import copy
from collections.abc import Iterator, Set
from dataclasses import fields as declared_fields
from typing import Any

from transformers import PretrainedConfig

CARRIED = (
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
    "use_cache",
    "dtype",
)
WITHOUT_MEANING = frozenset(
    {
        "architectures",
        "transformers_version",
        "output_hidden_states",
        "return_dict",
        "id2label",
        "label2id",
        "problem_type",
        "pretraining_tp",
    }
)
READ_BY_TRANSFORMERS = frozenset(
    {
        "attention_chunk_size",
        "layer_types",
        "num_kv_shared_layers",
        "quantization_config",
        "sliding_window",
    }
)
"""Fields that masks, caches or loading read from any configuration, declared or not."""


def carried(dense: PretrainedConfig) -> dict[str, Any]:
    """The fields that mean the same in the dense model and in its mixture."""
    return {name: copy.deepcopy(getattr(dense, name)) for name in CARRIED if hasattr(dense, name)}


def lost(dense: PretrainedConfig, known: Set[str], target: type[PretrainedConfig]) -> Iterator[str]:
    """Why fields beyond `known` ones keep a model out of a mixture configured by `target`."""
    if dense.is_heterogeneous:
        yield "its layers have configurations of their own"
        return
    declared, usual = _declared(type(dense)), type(dense)()
    for name in sorted(declared - known - set(CARRIED) - WITHOUT_MEANING):
        if (value := getattr(dense, name)) != getattr(usual, name):
            yield f"its {name} is {value!r}, for which there is no place"
    watched = (READ_BY_TRANSFORMERS | _declared(target)) - declared - set(CARRIED)
    for name in sorted(watched & set(vars(dense))):
        if (value := getattr(dense, name)) not in (None, False):
            yield f"its {name} is {value!r}, which {target.model_type} would read otherwise"


def _declared(config_class: type[PretrainedConfig]) -> set[str]:
    return {field.name for field in declared_fields(config_class)}
