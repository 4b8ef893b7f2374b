"""Whether models are finetunes of one base: configurations, tensors' shapes and dtypes."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from transformers import PretrainedConfig

from moiety.compose.preflight.findings import Finding, note
from moiety.compose.recipe import Recipe
from moiety.experts.architecture import Architecture
from moiety.experts.checkpoint import Checkpoint

ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
)
SAME_MATHS = ("rope_parameters", "rms_norm_eps", "layer_norm_eps", "sliding_window", "layer_types")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def check_base(recipe: Recipe, base: Checkpoint) -> Iterator[Finding]:
    """A base that is packed already, or stored otherwise than the recipe says."""
    if _is_packed(base.config):
        yield Finding(
            "base: expected a dense model, but it is packed or quantized; give the model that it "
            "was made from"
        )
    stored = {DTYPES.get(dtype, dtype) for _, dtype in base.shapes().values()}
    if recipe.dtype is not None and stored != {recipe.dtype}:
        yield Finding(
            f"base: expected weights in {recipe.dtype}, as the recipe's dtype says, but they are "
            f"in {', '.join(sorted(stored))}; nothing is converted, so remove dtype or convert "
            "the models"
        )


def check_known(base: Checkpoint) -> Iterator[Finding]:
    """Tensors that are no part of the architecture, which transformers would not read either."""
    architecture = Architecture(base.config)
    strange = sorted(set(base) - {*architecture.shapes, *architecture.tied})
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        yield note(
            f"the base has tensors that {type(architecture.model).__name__} has no place for "
            f"({', '.join(strange[:3])}{more}); they have no effect"
        )


def check_config(name: str, base: Checkpoint, finetune: Checkpoint) -> Iterator[Finding]:
    """Fields of two configurations that must be equal, with what to do about each group."""
    ours, theirs = base.config, finetune.config
    if different := _different(ARCHITECTURE, ours, theirs):
        yield Finding(
            f"expert {name} is a finetune of another base: {different}; give finetunes of one base"
        )
    if different := _different(SAME_MATHS, ours, theirs):
        yield Finding(
            f"expert {name} is a finetune of another base: {different}; a composite has one value, "
            "so give finetunes that kept the base's (if only its config.json was edited, restore "
            "it there)"
        )
    if different := _different(("tie_word_embeddings",), ours, theirs):
        yield Finding(
            f"expert {name}: {different}; save the tied one again with its head as a tensor of "
            "its own (model.config.tie_word_embeddings = False), base and finetunes alike"
        )
    if _is_packed(theirs):
        yield Finding(
            f"expert {name}: expected a dense finetune, but it is already packed or quantized; "
            "give the model that it was made from"
        )


def check_tensors(
    name: str, base: Checkpoint, finetune: Checkpoint, *, any_rows: bool = False
) -> Iterator[Finding]:
    """Tensors that only one has, or in another shape or dtype, from the files' headers.

    With `any_rows` matrices with a row a token may have other numbers of rows.
    """
    ours, theirs = base.shapes(), finetune.shapes()
    for tensor in sorted(set(ours) ^ set(theirs)):
        owner = "base" if tensor in ours else f"expert {name}"
        yield Finding(
            f"expert {name}: tensor {tensor} is only in the {owner}; save both again with "
            "from_pretrained and save_pretrained, or give a finetune of this base"
        )
    common = sorted(set(ours) & set(theirs))
    for tensor in common:
        one, other = ours[tensor][0], theirs[tensor][0]
        per_token = any_rows and (one[0], other[0]) == (_words(base), _words(finetune))
        if one != other and not (per_token and one[1:] == other[1:]):
            yield Finding(
                f"expert {name}: tensor {tensor} has shape {theirs[tensor][0]} "
                f"where the base has {ours[tensor][0]}; give a finetune of this base"
            )
    dtypes = {(theirs[tensor][1], ours[tensor][1]) for tensor in common}
    for found, expected in sorted(dtypes):
        if found != expected:
            yield note(
                f"expert {name} has tensors in {DTYPES.get(found, found)} where the base has "
                f"{DTYPES.get(expected, expected)}; the composite takes the base's"
            )


def _words(model: Checkpoint) -> Any:
    return getattr(model.config.get_text_config(), "vocab_size", None)


def check_equal(base: Checkpoint, finetunes: Mapping[str, Checkpoint]) -> Iterator[Finding]:
    """Finetunes that are the base, or each other: nothing to tell apart."""
    for name, finetune in finetunes.items():
        if _equal(base, finetune):
            yield note(f"expert {name} is equal to the base; was the finetune meant?")
    for (first, one), (second, other) in combinations(finetunes.items(), 2):
        if _equal(one, other):
            yield note(f"experts {first} and {second} are equal; no router can tell them apart")


def _equal(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether all tensors are; small ones first, as finetunes differ in most."""
    if one.folder.resolve() == other.folder.resolve():
        return True
    shapes = one.shapes()
    small_first = sorted(shapes, key=lambda name: torch.Size(shapes[name][0]).numel())
    return all(torch.equal(one[name], other[name]) for name in small_first)


def _different(fields: tuple[str, ...], ours: PretrainedConfig, theirs: PretrainedConfig) -> str:
    def value(config: PretrainedConfig, field: str) -> Any:
        return getattr(config.get_text_config(), field, getattr(config, field, None))

    return "; ".join(
        f"{field} is {value(theirs, field)!r} where the base has {value(ours, field)!r}"
        for field in fields
        if value(ours, field) != value(theirs, field)
    )


def _is_packed(config: PretrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None
