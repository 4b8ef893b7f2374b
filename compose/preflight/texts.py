"""Whether there is text enough, and whether what is measured on was kept apart."""

from collections.abc import Iterator, Sequence
from typing import Any

from moiety.compose.preflight.findings import Finding, note
from moiety.compose.recipe import Expert, Recipe
from moiety.errors import InputError
from moiety.text import read_documents, token_windows

LEAST_WINDOWS = 4
"""Windows' worth of tokens without which neither pruning nor a gate has anything to go by."""
HELD_WINDOWS = 8


def check_texts(recipe: Recipe, tokenizer: Any | None) -> Iterator[Finding]:
    """Missing, unreadable and short text, and documents that are in more than one place.

    Without a tokenizer (the base cannot be read) only whether text can be read at all.
    """
    calibration: dict[str, Sequence[str]] = {}
    for expert in recipe.experts:
        if recipe.needs_text or expert.domain.has_text:
            try:
                calibration[expert.name] = expert.domain.documents()
                if tokenizer is not None:
                    yield from _length(recipe, expert, calibration[expert.name], tokenizer)
            except InputError as error:
                yield Finding(f"expert {expert.name}, calibration text: {error}")
        yield from _heldout(recipe, expert, calibration.get(expert.name, ()), tokenizer)
    yield from _shared_text(calibration)
    silent = [expert.name for expert in recipe.experts if expert.domain.heldout is None]
    if silent:
        yield note(
            f"no held-out text for {', '.join(silent)}, so the result is not measured; "
            "give domain.heldout for every expert"
        )


def _length(
    recipe: Recipe, expert: Expert, documents: Sequence[str], tokenizer: Any
) -> Iterator[Finding]:
    wanted, context = recipe.calibration_windows, recipe.context_length
    windows = token_windows(tokenizer, documents, context, wanted)
    tokens = int(windows.mask_WC.sum())
    if not recipe.needs_text:
        return
    if tokens < LEAST_WINDOWS * context:
        source = "its prompts are" if expert.domain.prompts else "its calibration text is"
        yield Finding(
            f"expert {expert.name}: {source} {tokens} tokens, but at least "
            f"{LEAST_WINDOWS * context} ({LEAST_WINDOWS} windows of context_length {context}) are "
            f"needed to prune and route by; give more with --data {expert.name}=FILE or "
            "domain.calibration, or lower context_length"
        )
    elif tokens < wanted * context // 2:
        yield note(
            f"expert {expert.name}: its calibration text gives {tokens} tokens where "
            f"calibration_windows {wanted} of {context} would take {wanted * context}; more text "
            "prunes better"
        )


def _heldout(
    recipe: Recipe, expert: Expert, calibration: Sequence[str], tokenizer: Any | None
) -> Iterator[Finding]:
    path = expert.domain.heldout
    if path is None:
        return
    try:
        documents = read_documents(path)
        if tokenizer is not None:
            token_windows(tokenizer, documents, recipe.context_length, limit=HELD_WINDOWS)
    except InputError as error:
        yield Finding(f"expert {expert.name}, heldout text: {error}")
        return
    if path == expert.domain.calibration:
        yield note(
            f"expert {expert.name}: its held-out text is its calibration text, so what is measured "
            "flatters; give text that was kept apart"
        )
        return
    known = {text.strip() for text in calibration}
    count = sum(text.strip() in known for text in documents)
    if count:
        yield note(
            f"expert {expert.name}: {count} of {len(documents)} held-out documents are in its "
            "calibration text too, so what is measured flatters; remove them from one"
        )


def _shared_text(calibration: dict[str, Sequence[str]]) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    shared: dict[tuple[str, str], int] = {}
    for name, documents in calibration.items():
        for text in {text.strip() for text in documents}:
            owner = seen.setdefault(text, name)
            if owner != name:
                shared[owner, name] = shared.get((owner, name), 0) + 1
    for (first, second), count in shared.items():
        yield note(
            f"experts {first} and {second} share {count} calibration documents; a router cannot "
            "learn from those whose they are"
        )
