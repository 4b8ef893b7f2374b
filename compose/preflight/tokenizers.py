"""Whether tokenizers read text the same way: vocabulary, merges, added tokens, splitting."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moiety.compose.preflight.findings import Finding, note
from moiety.compose.recipe import Recipe
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.preflight import load_tokenizer
from moiety.files import read_json

SPLITTING = {
    "normalizer": "normalises text",
    "pre_tokenizer": "splits text into words",
    "post_processor": "adds special tokens",
    "decoder": "decodes tokens",
}
UNION = (
    "write tokenizer: union in the recipe, and mergekit gives every model the tokens of all first"
)
GENERATION = "generation_config.json"
NOT_SETTINGS = ("transformers_version", "_from_model_config")


def check_tokenizer(
    recipe: Recipe, name: str, base: Checkpoint, finetune: Checkpoint
) -> Iterator[Finding]:
    """Differences of two models' vocabularies and tokenizers; the composite has the base's."""
    ours, theirs = load_tokenizer(base.folder), load_tokenizer(finetune.folder)
    rows, found = _rows(base), _rows(finetune)
    words, other_words = ours.get_vocab(), theirs.get_vocab()
    if recipe.tokenizer == "union" and (rows != found or words != other_words):
        yield note(
            f"expert {name} has another vocabulary than the base "
            f"({_count(words, other_words)}); mergekit gives both the tokens of all models"
        )
        return
    if rows != found:
        yield Finding(
            f"expert {name} is a finetune of another base: vocab_size is {found} where the base "
            f"has {rows}; {UNION}"
        )
    if words != other_words:
        yield Finding(
            f"expert {name}: its tokenizer has another vocabulary than the base's "
            f"({_count(words, other_words)}); tokens would change their meaning, so "
            + (UNION if rows == found else "give finetunes that kept it")
        )
    elif ours.special_tokens_map != theirs.special_tokens_map:
        different = _first_difference(ours.special_tokens_map, theirs.special_tokens_map)
        yield Finding(
            f"expert {name}: its tokenizer has other special tokens than the base's ({different}); "
            "copy the base's tokenizer files there if it was trained with those"
        )
    if words == other_words:
        yield from _content(name, ours, theirs)


def check_generation(name: str, base: Path, finetune: Path) -> Iterator[Finding]:
    """Notes on settings of generation and on chat templates, of which a composite has one."""
    settings = [_settings(folder) for folder in (base, finetune)]
    if settings[0] != settings[1]:
        yield note(
            f"expert {name} has another generation config than the base "
            f"({_first_difference(*settings)}); the composite takes the base's"
        )
    templates = [_template(folder) for folder in (base, finetune)]
    if templates[0] != templates[1]:
        yield note(
            f"expert {name} has another chat template than the base"
            f"{' (which has none)' if templates[0] is None else ''}; the composite takes the "
            "base's, so prompts may look unlike those it was trained on"
        )


def _rows(model: Checkpoint) -> Any:
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _count(ours: dict[str, int], theirs: dict[str, int]) -> str:
    missing, more = len(ours.keys() - theirs.keys()), len(theirs.keys() - ours.keys())
    moved = sum(ours[word] != theirs[word] for word in ours.keys() & theirs.keys())
    return f"{missing} tokens fewer, {more} more, {moved} with another id"


def _content(name: str, ours: Any, theirs: Any) -> Iterator[Finding]:
    """What two tokenizers of one vocabulary do differently; slow ones do not tell."""
    if not (ours.is_fast and theirs.is_fast):
        return
    one, other = (json.loads(part.backend_tokenizer.to_str()) for part in (ours, theirs))
    advice = "copy the base's tokenizer files there if it was trained with those"
    if one["model"].get("merges") != other["model"].get("merges"):
        yield Finding(f"expert {name}: its tokenizer merges otherwise than the base's; {advice}")
    added = [{token["content"]: token for token in part["added_tokens"]} for part in (one, other)]
    if added[0] != added[1]:
        yield Finding(
            f"expert {name}: its tokenizer's added tokens differ from the base's "
            f"({_first_difference(*added)}); {advice}"
        )
    for part, does in SPLITTING.items():
        if one.get(part) != other.get(part):
            yield Finding(
                f"expert {name}: its tokenizer {does} otherwise than the base's ({part}); {advice}"
            )


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / GENERATION).is_file():
        return {}
    found = read_json(folder / GENERATION)
    return {name: value for name, value in found.items() if name not in NOT_SETTINGS}


def _template(folder: Path) -> Any:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    return read_json(settings).get("chat_template") if settings.is_file() else None


def _first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    name = next(
        name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)
    )
    return f"{name}: {theirs.get(name)!r} where the base has {ours.get(name)!r}"
