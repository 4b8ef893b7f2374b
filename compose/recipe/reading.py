"""Recipes as YAML, and mistakes in them explained: the line, the field, the rule."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml
from pydantic.fields import FieldInfo

from moiety.compose.recipe.kinds import KINDS
from moiety.compose.recipe.sections import Part
from moiety.errors import InputError


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML in which `2:4` is text, not YAML 1.1's number 124 in base 60."""


_INTEGER = "tag:yaml.org,2002:int"
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != _INTEGER]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path) -> tuple[Any, Any]:
    """The tree and the values of a YAML file that holds a mapping; InputError if it does not."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=RecipeLoader)
        values = yaml.load(text, Loader=RecipeLoader)
    except OSError as error:
        raise InputError(f"expected a recipe at {path}, but: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"expected YAML in {path}, but: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"expected fields such as base and experts in {path}, but found none")
    if twice := list(_twice(tree)):
        raise InputError(f"{path} says the same field twice: {'; '.join(twice)}; keep one of them")
    return tree, values


def _twice(node: Any) -> Iterator[str]:
    """Keys given again in one mapping, of which YAML would silently take the last."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _twice(item)
    if isinstance(node, yaml.MappingNode):
        seen: set[Any] = set()
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                yield f"line {key.start_mark.line + 1}: {name}"
            seen.add(name)
            yield from _twice(value)


def explain(path: Path, tree: Any, error: pydantic.ValidationError, top: type[Part]) -> str:
    """Every mistake that pydantic found in a file, with its line; `top` is the whole recipe."""
    problems = dict.fromkeys(_problem(tree, detail, top) for detail in error.errors())
    return f"{path} is not a valid recipe: " + "; ".join(problems)


def _problem(tree: Any, detail: Any, top: type[Part]) -> str:
    location, kind = _location(detail["loc"])
    field = ".".join(str(part) for part in location)
    line = line_of(tree, location)
    if detail["type"] == "extra_forbidden":
        return f"line {line}: unknown field {field}{_nearest(location, kind, top)}"
    message = detail["msg"].removeprefix("Value error, ")
    told = detail["type"] == "missing" or "but it is" in message
    got = "" if told else f", but it is {detail['input']!r}"
    if detail["type"] == "union_tag_invalid":
        location, field = (*location, "kind"), f"{field}.kind"
        line = line_of(tree, location)
        message = f"expected {detail['ctx']['expected_tags']}"
        got = f", but it is {detail['ctx']['tag']!r}"
        got += _nearest_value(detail["ctx"]["tag"], detail["ctx"]["expected_tags"])
    if detail["type"] == "literal_error":
        got += _nearest_value(detail["input"], detail["ctx"]["expected"])
    if not field:
        return f"line {line_of(tree, _told_of(message))}: {message}"
    return f"line {line}: {field}: {message}{got}"


def _told_of(message: str) -> tuple[str, ...]:
    """The field that a message about several sections begins with, such as `compose.top_k`."""
    found = re.match(r"[a-z_]+(\.[a-z_]+)*", message)
    return tuple(found[0].split(".")) if found else ()


def _location(parts: tuple[str | int, ...]) -> tuple[tuple[str | int, ...], str | None]:
    """Where in the file, without the names that pydantic adds for the members of a union."""
    kind = str(parts[1]) if len(parts) > 1 and parts[0] == "compose" else None
    known = kind if kind in KINDS else None
    found = [part for number, part in enumerate(parts) if not (number == 1 and known)]
    plain = [part for part in found if isinstance(part, int) or re.fullmatch(r"\w[\w.-]*", part)]
    unions = ("str", "float", "bool", "Merging")
    return tuple(part for part in plain if part not in unions), known


def _nearest(location: tuple[str | int, ...], kind: str | None, top: type[Part]) -> str:
    known = _fields_at(location[:-1], kind, top)
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def _nearest_value(given: Any, expected: str) -> str:
    close = difflib.get_close_matches(str(given), re.findall(r"'([^']+)'", expected), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _fields_at(
    location: tuple[str | int, ...], kind: str | None, top: type[Part]
) -> dict[str, FieldInfo]:
    """The fields known at a place, found by walking the sections' types from the top."""
    part = top
    for name in location:
        if name == "compose":
            part = KINDS[kind or "mixture"]
        elif isinstance(name, str) and name in part.model_fields:
            part = next(_parts_in(part.model_fields[name].annotation), part)
    return part.model_fields


def _parts_in(annotation: Any) -> Iterator[type[Part]]:
    """The sections that a type such as `str | Merging` or `list[Expert]` may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts_in(inner)


def line_of(node: Any, location: tuple[str | int, ...]) -> int:
    """The line (from 1) of the deepest part of `location` that the YAML tree holds."""
    line = node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            if part >= len(node.value):
                return line
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == part), None)
            if pair is None:
                return line
            line, node = pair[0].start_mark.line + 1, pair[1]
            continue
        line = node.start_mark.line + 1
    return line
