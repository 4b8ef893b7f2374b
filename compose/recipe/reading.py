"""Recipes as YAML, and mistakes in them explained: the line, the field, the rule."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from moiety.compose.recipe.kinds import KINDS, Merging
from moiety.compose.recipe.sections import Domain, Evaluate, Expert, Part, Prune, Route
from moiety.errors import InputError


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML in which `2:4` is text, not YAML 1.1's number 124 in base 60."""


_INTEGER = "tag:yaml.org,2002:int"
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != _INTEGER]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?\d+$"), list("-+0123456789"))

SECTIONS: Mapping[str, type[Part]] = {
    "prune": Prune,
    "route": Route,
    "evaluate": Evaluate,
    "experts": Expert,
    "domain": Domain,
    "shared": Merging,
}


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
    return tree, values


def explain(path: Path, tree: Any, error: pydantic.ValidationError, top: type[Part]) -> str:
    """Every mistake that pydantic found in a file, with its line; `top` is the whole recipe."""
    problems = dict.fromkeys(_problem(tree, detail, top) for detail in error.errors())
    return f"{path} is not a valid recipe: " + "; ".join(problems)


def _problem(tree: Any, detail: Any, top: type[Part]) -> str:
    location, kind = _location(detail["loc"])
    field = ".".join(str(part) for part in location)
    line = _line(tree, location)
    if detail["type"] == "extra_forbidden":
        return f"line {line}: unknown field {field}{_nearest(location, kind, top)}"
    message = detail["msg"].removeprefix("Value error, ")
    got = "" if detail["type"] == "missing" else f", but it is {detail['input']!r}"
    if detail["type"] == "union_tag_invalid":
        location, field = (*location, "kind"), f"{field}.kind"
        line = _line(tree, location)
        message = f"expected {detail['ctx']['expected_tags']}"
        got = f", but it is {detail['ctx']['tag']!r}"
    return f"line {line}: {message}" if not field else f"line {line}: {field}: {message}{got}"


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


def _fields_at(location: tuple[str | int, ...], kind: str | None, top: type[Part]) -> list[str]:
    names = [part for part in location if isinstance(part, str)]
    if names == ["compose"]:
        return list(KINDS[kind or "mixture"].model_fields)
    return list((SECTIONS[names[-1]] if names else top).model_fields)


def _line(node: Any, location: tuple[str | int, ...]) -> int:
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
