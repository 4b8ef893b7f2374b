"""Everything that can be refused before any long work: models that do not fit, text that is not.

Problems are collected, so that one report names them all; notes are what stops nobody.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moiety.compose.preflight.adapters import check_adapter
from moiety.compose.preflight.findings import Finding, problems_of
from moiety.compose.preflight.kinds import check_kind
from moiety.compose.preflight.models import (
    check_base,
    check_config,
    check_equal,
    check_known,
    check_tensors,
)
from moiety.compose.preflight.texts import check_texts
from moiety.compose.preflight.tokenizers import check_generation, check_tokenizer
from moiety.compose.recipe import Expert, Recipe
from moiety.errors import InputError
from moiety.experts.checkpoint import ADAPTER, Checkpoint, local_folder
from moiety.experts.preflight import load_tokenizer

__all__ = ["Preflight", "examine", "preflight"]


@dataclass(frozen=True)
class Preflight:
    """What speaks against building a recipe, and what a user may want to know of it first."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]


def preflight(recipe: Recipe) -> tuple[str, ...]:
    """Raise one InputError that lists every reason why the recipe cannot be built; else notes."""
    found = examine(recipe)
    if found.problems:
        listed = "\n".join(f"  - {problem}" for problem in found.problems)
        count = "1 problem" if len(found.problems) == 1 else f"{len(found.problems)} problems"
        raise InputError(f"the recipe cannot be built, {count}:\n{listed}")
    return found.notes


def examine(recipe: Recipe) -> Preflight:
    """Look at every model, tokenizer and text of a recipe, from configurations and headers."""
    findings = list(_findings(recipe))
    problems = dict.fromkeys(finding.text for finding in findings if not finding.is_note)
    notes = dict.fromkeys(finding.text for finding in findings if finding.is_note)
    return Preflight(tuple(problems), tuple(notes))


def _findings(recipe: Recipe) -> list[Finding]:
    problems = [
        Finding(
            f"evaluate.problems.{name}: expected a JSONL file at {path}, but there is none; "
            "give its path or remove it"
        )
        for name, path in recipe.evaluate.problems.items()
        if not Path(path).is_file()
    ]
    return problems + _of_models(recipe)


def _of_models(recipe: Recipe) -> list[Finding]:
    found = list(problems_of("base", functools.partial(Checkpoint, recipe.base)))
    if found:
        return found + list(check_texts(recipe, None))
    base = Checkpoint(recipe.base)
    found = list(problems_of("base", lambda: base.config))
    found += problems_of("base", lambda: load_tokenizer(base.folder))
    if found:
        return found + list(check_texts(recipe, None))
    found += check_base(recipe, base)
    found += check_kind(recipe, base)
    found += problems_of("base", lambda: found.extend(check_known(base)))
    full: dict[str, Checkpoint] = {}
    for expert in recipe.experts:
        found += _guarded(expert, lambda expert=expert: _of_expert(recipe, base, expert, full))
    found += check_equal(base, full)
    return found + list(check_texts(recipe, load_tokenizer(base.folder)))


def _of_expert(
    recipe: Recipe, base: Checkpoint, expert: Expert, full: dict[str, Checkpoint]
) -> list[Finding]:
    folder = local_folder(expert.model)
    if (folder / ADAPTER).is_file():
        return list(check_adapter(expert.name, folder, base, recipe.base))
    checkpoint = Checkpoint(folder)
    found = list(check_config(expert.name, base, checkpoint))
    found += _guarded(expert, lambda: list(check_tokenizer(recipe, expert.name, base, checkpoint)))
    found += check_generation(expert.name, base.folder, checkpoint.folder)
    if not any(not finding.is_note for finding in found):
        tensors = list(
            check_tensors(expert.name, base, checkpoint, any_rows=recipe.tokenizer == "union")
        )
        found += tensors
        if not any(not finding.is_note for finding in tensors):
            full[expert.name] = checkpoint
    return found


def _guarded(expert: Expert, look: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return look()
    except InputError as error:
        return [Finding(f"expert {expert.name}: {error}")]
