"""Write a recipe to start from: every field with its default and a comment of what it does.

The comments are the fields' own descriptions, so that they cannot say anything else than the code.
"""

import json
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import huggingface_hub
import yaml
from pydantic.fields import FieldInfo

from moiety.compose.recipe.kinds import KINDS
from moiety.compose.recipe.mergekit import expert_names
from moiety.compose.recipe.recipe import Recipe
from moiety.compose.recipe.sections import Domain, Part
from moiety.errors import InputError, OutputError
from moiety.experts.checkpoint import ADAPTER
from moiety.files import check_writable, read_json, write_text

NO_BASE = "BASE"
"""Written where the base could not be found; no model bears this name."""
WIDTH = 98
SECTIONS = ("prune", "compose", "route", "evaluate")


@dataclass(frozen=True)
class NewRecipe:
    """Where a recipe was written, its experts' names, its base, and what is still to be filled in."""

    path: Path
    names: tuple[str, ...]
    base: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        return {**vars(self), "path": str(self.path)}


def init_recipe(
    models: Sequence[str],
    out: str | Path,
    *,
    base: str | None = None,
    kind: str = "mixture",
    data: Mapping[str, str] | None = None,
    heldout: Mapping[str, str] | None = None,
) -> NewRecipe:
    """Write a commented recipe for finetunes (folders, hub ids, PEFT adapters) to `out`.

    Experts are named after their folders; `data` and `heldout` are text by those names. Without
    `base` it is what the models' own files name. Raises OutputError when `out` exists, InputError
    for fewer than two models, an unknown kind or text of no expert.
    """
    out, data, heldout = Path(out), data or {}, heldout or {}
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, but it is {kind!r}")
    if len(models) < 2:
        raise InputError(f"expected at least 2 models, but got {len(models)}; name every finetune")
    names = expert_names(models)
    for name in (*data, *heldout):
        if name not in names:
            raise InputError(
                f"expected text for the experts {', '.join(names)}, but {name} is none of them"
            )
    if out.exists():
        raise OutputError(f"expected {out} to be absent, but it exists; choose another name")
    check_writable(out.absolute().parent)
    found, notes = (base, []) if base else find_base(models)
    silent = [name for name in names if name not in data]
    if silent:
        notes.append(f"give the text of {', '.join(silent)} as their domain, before building")
    experts = [
        _expert(name, _place(model, out), _named(name, data, out), _named(name, heldout, out))
        for name, model in zip(names, models, strict=True)
    ]
    write_text(out, _recipe(_place(found or NO_BASE, out), experts, KINDS[kind], notes))
    return NewRecipe(out, tuple(names), found or NO_BASE, tuple(notes))


def find_base(models: Sequence[str]) -> tuple[str | None, list[str]]:
    """The base that the files of all models name, or None, and notes for the user.

    Read are adapter_config.json, the model card's `base_model` and config.json of local folders.
    """
    named = {model: _named_base(Path(model).expanduser()) for model in models}
    found = sorted({base for base in named.values() if base})
    if len(found) == 1:
        return found[0], [f"the base {found[0]} is what the models' own files name; check it"]
    if found:
        listed = "; ".join(f"{model} names {base}" for model, base in named.items() if base)
        return None, [f"the models name different bases ({listed}): write the base in the recipe"]
    return None, ["no model's files name its base: write it in the place of BASE in the recipe"]


def _named_base(folder: Path) -> str | None:
    candidates: list[Any] = []
    if (folder / ADAPTER).is_file():
        candidates.append(read_json(folder / ADAPTER).get("base_model_name_or_path"))
    if (folder / "README.md").is_file():
        try:
            card = huggingface_hub.metadata_load(folder / "README.md") or {}
        except (ValueError, OSError, yaml.YAMLError):
            card = {}
        bases = card.get("base_model")
        candidates.append(bases[0] if isinstance(bases, list) and len(bases) == 1 else bases)
    if (folder / "config.json").is_file():
        candidates.append(read_json(folder / "config.json").get("_name_or_path"))
    own = folder.resolve()
    return next(
        (
            name
            for name in candidates
            if isinstance(name, str) and name and Path(name).expanduser().resolve() != own
        ),
        None,
    )


def _place(path: str, out: Path) -> str:
    """A path as a recipe says it: below the recipe's folder relative to it, else in full."""
    full, folder = Path(path).expanduser(), out.absolute().parent
    if not full.exists():
        return path
    full = full.resolve()
    inside = full.is_relative_to(folder.resolve())
    return os.path.relpath(full, folder.resolve()) if inside else str(full)


def _named(name: str, given: Mapping[str, str], out: Path) -> str | None:
    return _place(given[name], out) if name in given else None


def _expert(name: str, model: str, data: str | None, heldout: str | None) -> list[str]:
    lines = [f"  - name: {_scalar(name)}", f"    model: {_scalar(model)}"]
    if data is None and heldout is None:
        return [
            *lines,
            "    # domain:",
            f"    #   calibration: {name}.jsonl",
            f"    #   heldout: {name}.heldout.jsonl",
        ]
    lines.append("    domain:")
    for field, value in (("calibration", data), ("heldout", heldout)):
        mark, shown = ("", value) if value else ("# ", f"{name}.{field}.jsonl")
        lines.append(f"      {mark}{field}: {_scalar(shown)}")
    return lines


def _recipe(
    base: str, experts: Sequence[Sequence[str]], kind: type[Part], notes: Sequence[str]
) -> str:
    lines = ["# A recipe for `moiety build`; paths may be relative to this file."]
    for told in notes:
        lines += textwrap.wrap(f"Note: {told}", WIDTH, initial_indent="# ", subsequent_indent="# ")
    for name, field in Recipe.model_fields.items():
        if name == "base":
            lines += ["", _line(name, base, field, "")]
        elif name == "experts":
            lines += ["", "# Each expert may have a domain:"]
            lines += [f"#   {part}: {f.description}" for part, f in Domain.model_fields.items()]
            lines += [f"experts:  # {field.description}"]
            lines += [line for expert in experts for line in expert]
            lines.append("")
        elif name in SECTIONS:
            lines += ["", *_section(name, kind if name == "compose" else type(field.default))]
        else:
            lines.append(_line(name, field.default, field, ""))
    return "\n".join(lines) + "\n"


def _section(name: str, part: type[Part]) -> Iterator[str]:
    paragraph = re.sub(r"\s+", " ", (part.__doc__ or "").strip())
    yield from textwrap.wrap(paragraph, WIDTH, initial_indent="# ", subsequent_indent="# ")
    yield f"{name}:"
    yield from _fields(part, "  ")


def _fields(part: type[Part], indent: str) -> Iterator[str]:
    kind_first = sorted(part.model_fields.items(), key=lambda item: item[0] != "kind")
    for name, field in kind_first:
        value = field.get_default(call_default_factory=True)
        if isinstance(value, Part):
            yield f"{indent}{name}:"
            yield from _fields(type(value), f"{indent}  ")
        else:
            yield _line(name, value, field, indent)


def _line(name: str, value: Any, field: FieldInfo, indent: str) -> str:
    told = field.description or ""
    comment = "; ".join(
        part for part in (told, _alternatives(field.annotation, value, told)) if part
    )
    text = f"{indent}{name}: {_scalar(value)}"
    return f"{text}  # {comment}" if comment else text


def _alternatives(annotation: Any, value: Any, told: str) -> str:
    """The other values that a field with a fixed set of them takes, but for those just told."""
    choices = [
        choice
        for part in (annotation, *get_args(annotation))
        if get_origin(part) is Literal
        for choice in get_args(part)
    ]
    others = [
        str(choice)
        for choice in dict.fromkeys(choices)
        if choice != value and not re.search(rf"\b{re.escape(str(choice))}\b", told)
    ]
    return f"or {', '.join(others)}" if others else ""


def _scalar(value: Any) -> str:
    """A value in YAML on one line; plain where it reads back as the same text."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z./][\w./:+-]*|\d+:\d+", value):
        plain = value.lower() not in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
        return value if plain else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)
