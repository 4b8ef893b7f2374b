"""Whether a PEFT adapter can be merged into the base, without merging it: its names and shapes."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moiety.compose.preflight.findings import Finding, note
from moiety.errors import InputError
from moiety.experts.checkpoint import ADAPTER, Checkpoint
from moiety.experts.preflight import load_tokenizer
from moiety.experts.source import ADAPTER_WEIGHTS, CAUSAL, EMBEDDINGS, TOKENIZER_FILES
from moiety.files import read_json

PREFIX = "base_model.model."
LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def check_adapter(name: str, folder: Path, base: Checkpoint, base_name: str) -> Iterator[Finding]:
    """What would stop PEFT from merging an adapter into the base, and what it says of its base."""
    where = f"expert {name}, the adapter {folder}"
    if importlib.util.find_spec("peft") is None:
        yield Finding(f"{where}: merging it needs peft, which is not installed; install peft")
    config = read_json(folder / ADAPTER)
    if not isinstance(config, dict) or not config.get("peft_type"):
        yield Finding(f"{where}: expected a peft_type in {ADAPTER}, but there is none")
        return
    if config.get("task_type") not in (None, CAUSAL):
        yield Finding(
            f"{where}: expected one of a causal language model, but it is for "
            f"{config['task_type']}; give another"
        )
    yield from _check_named_base(where, config.get("base_model_name_or_path"), base, base_name)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        yield Finding(
            f"{where}: expected {ADAPTER_WEIGHTS}, but there is none; only safetensors adapters "
            "are read, so save it again with PEFT's save_pretrained"
        )
        return
    held = _shapes(folder / ADAPTER_WEIGHTS)
    yield from _check_vocabulary(where, folder, held, base)
    yield from _check_modules(where, held, base)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, "pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"expected a safetensors file at {file}, but: {error}") from error


def _check_named_base(
    where: str, named: Any, base: Checkpoint, base_name: str
) -> Iterator[Finding]:
    if not isinstance(named, str) or not named or named == base_name:
        return
    folder = Path(named).expanduser()
    if not folder.is_dir():
        if Path(named).name.lower() != Path(base_name).name.lower():
            yield note(
                f"{where}, names {named} as its base, but the recipe's is {base_name}; "
                "make sure that they are the same model"
            )
        return
    if folder.resolve() == base.folder.resolve():
        return
    theirs = Checkpoint(folder)
    if theirs.shapes() != base.shapes() or any(
        not bool((theirs[name] == base[name]).all()) for name in base
    ):
        yield Finding(
            f"{where}: its base is {named}, whose weights are not those of {base_name}; "
            "give that as the recipe's base, or adapters of this one"
        )


def _check_vocabulary(
    where: str, folder: Path, held: dict[str, tuple[int, ...]], base: Checkpoint
) -> Iterator[Finding]:
    rows = getattr(base.config.get_text_config(), "vocab_size", None)
    for name, shape in held.items():
        if EMBEDDINGS.search(name) and shape[0] != rows:
            yield Finding(
                f"{where}: it holds embeddings of {shape[0]} tokens where the base has {rows}; "
                "give an adapter that was trained without added tokens, or merge it and give all "
                "models one tokenizer first (docs/recipes.md)"
            )
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        ours, theirs = load_tokenizer(base.folder), load_tokenizer(folder)
        if ours.get_vocab() != theirs.get_vocab():
            yield Finding(
                f"{where}: its tokenizer has another vocabulary than the base's; tokens would "
                "change their meaning, so give an adapter that kept it"
            )


def _check_modules(
    where: str, held: dict[str, tuple[int, ...]], base: Checkpoint
) -> Iterator[Finding]:
    weights = base.shapes()
    for name, shape in held.items():
        match = LOW_RANK.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            continue
        weight = f"{match['module']}.weight"
        if weight not in weights:
            if match["module"] == "lm_head" and base.config.tie_word_embeddings:
                continue
            yield Finding(
                f"{where}: it changes {match['module']}, which the base does not have; it belongs "
                "to another base"
            )
            return
        side = match["side"] == "A"
        ours, theirs = weights[weight][0][int(side)], shape[int(side)]
        if ours != theirs:
            yield Finding(
                f"{where}: {name} is for {theirs} features where the base's {match['module']} "
                f"has {ours}; it belongs to another base"
            )
            return
