"""Everything that can be refused before any long work: models that do not fit, text that is not.

Problems are collected, so that one report names them all.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moiety.compose.mixture.tensors import check_family
from moiety.compose.recipe import Expert, Recipe
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.pattern import Pattern
from moiety.experts.preflight import load_tokenizer
from moiety.text import read_documents, token_windows

CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)


def preflight(recipe: Recipe) -> None:
    """Raise one InputError that lists every reason why the recipe cannot be built."""
    problems = list(_problems(recipe))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(f"the recipe cannot be built, {count}:\n{listed}")


def _problems(recipe: Recipe) -> Iterator[str]:
    try:
        base = Checkpoint(recipe.base)
        check_family(base.config)
        pattern = Pattern.parse(recipe.prune.pattern)
        for width in (base.config.hidden_size, base.config.intermediate_size):
            pattern.check_width(width)
        tokenizer = load_tokenizer(base.folder)
    except InputError as error:
        yield f"base: {error}"
        return
    for expert in recipe.experts:
        try:
            checkpoint = Checkpoint(expert.model)
            yield from _differences(expert.name, base, checkpoint)
            yield from _tokenizer_differences(expert.name, tokenizer, checkpoint.folder)
        except InputError as error:
            yield f"expert {expert.name}: {error}"
        yield from _text_problems(expert, tokenizer, recipe.context_length)
    for name, path in recipe.evaluate.problems.items():
        if not Path(path).is_file():
            yield f"evaluate.problems.{name}: expected a JSONL file at {path}, but there is none"


def _differences(name: str, base: Checkpoint, finetune: Checkpoint) -> Iterator[str]:
    different = [
        f"{field} is {theirs!r} where the base has {ours!r}"
        for field in CONFIG_FIELDS
        if (ours := getattr(base.config, field, None))
        != (theirs := getattr(finetune.config, field, None))
    ]
    if different:
        yield (
            f"expert {name} is a finetune of another base: {'; '.join(different)}; "
            "give finetunes of one base"
        )
        return
    yield from _tensor_differences(name, base, finetune)


def _tensor_differences(name: str, base: Checkpoint, finetune: Checkpoint) -> Iterator[str]:
    ours, theirs = base.shapes(), finetune.shapes()
    if getattr(finetune.config, "quantization_config", None) is not None:
        yield f"expert {name}: expected a dense finetune, but it is already packed or quantized"
        return
    for tensor in sorted(set(ours) ^ set(theirs)):
        owner = "base" if tensor in ours else f"expert {name}"
        yield f"expert {name}: tensor {tensor} is only in the {owner}"
    for tensor in sorted(set(ours) & set(theirs)):
        if ours[tensor][0] != theirs[tensor][0]:
            yield (
                f"expert {name}: tensor {tensor} has shape {theirs[tensor][0]} "
                f"where the base has {ours[tensor][0]}"
            )


def _tokenizer_differences(name: str, ours: Any, folder: Path) -> Iterator[str]:
    theirs = load_tokenizer(folder)
    if ours.get_vocab() != theirs.get_vocab():
        yield (
            f"expert {name}: its tokenizer has another vocabulary than the base's; "
            "tokens would change their meaning, so give finetunes that kept it"
        )
    elif ours.special_tokens_map != theirs.special_tokens_map:
        yield f"expert {name}: its tokenizer has other special tokens than the base's"


def _text_problems(expert: Expert, tokenizer: Any, context_length: int) -> Iterator[str]:
    for kind in ("calibration", "heldout"):
        path = getattr(expert.domain, kind)
        if path is None:
            continue
        try:
            token_windows(tokenizer, read_documents(path), context_length, limit=8)
        except InputError as error:
            yield f"expert {expert.name}, {kind} text: {error}"
