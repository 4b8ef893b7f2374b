"""Recipes: what to compose, from what, in one YAML file or the same as Python objects."""

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moiety.errors import InputError
from moiety.experts.methods.refit import STEPS
from moiety.experts.pattern import Pattern
from moiety.experts.recovery.block import BlockRecovery
from moiety.experts.settings import PruneSettings
from moiety.routers import FitSettings, TrainSettings


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML in which `2:4` is text, not YAML 1.1's number 124 in base 60."""


_INTEGER = "tag:yaml.org,2002:int"
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != _INTEGER]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?\d+$"), list("-+0123456789"))


class Part(BaseModel):
    """A frozen section of a recipe that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Domain(Part):
    """A domain's text: `calibration` steers pruning and routing, `heldout` is only measured on."""

    calibration: str
    heldout: str | None = None


class Expert(Part):
    """One finetune: its name, its model (folder or hub id) and its domain's text."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    model: str
    domain: Domain

    @field_validator("domain", mode="before")
    @classmethod
    def _plain_path(cls, value: Any) -> Any:
        return {"calibration": value} if isinstance(value, str) else value


class Prune(Part):
    """How each finetune is pruned; see moiety.experts.PruneSettings.

    `pattern` is `2:4`, any other N:M, or the share of weights kept, such as 0.5. `recover`
    trains the kept values block by block afterwards.
    """

    pattern: str = "2:4"
    sites: Literal["ffn", "all"] = "ffn"
    method: Literal["magnitude", "wanda", "ria", "sparsegpt", "alps"] = "sparsegpt"
    refit_steps: int = Field(default=STEPS, ge=0)
    recover: bool = False
    values: Literal["bf16", "fp16", "fp32", "int8", "int4"] = "bf16"

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, float) else value
        if isinstance(text, str):
            Pattern.parse(text)
        return text


class Compose(Part):
    """What is built: a mixture of sparse FFN experts that routes each token to `top_k` of them.

    `shared` says where everything that is not an expert comes from: the base, the soup
    (average) of the finetunes, task arithmetic with `shared_weight` on every task vector, or
    `auto`, whichever of these the calibration text prefers.
    """

    kind: Literal["mixture"] = "mixture"
    top_k: int = Field(default=2, ge=1)
    shared: Literal["auto", "base", "soup", "task_arithmetic"] = "auto"
    shared_weight: float = Field(default=0.25, gt=0, le=2)


class Route(Part):
    """How the gates are learned: a closed-form start, then `train_steps` of gate-only training."""

    init: Literal["ridge", "centroid", "random"] = "ridge"
    penalty: float = Field(default=FitSettings().penalty, gt=0)
    train_steps: int = Field(default=100, ge=0)
    learning_rate: float = Field(default=TrainSettings().learning_rate, gt=0)
    domain_weight: float = Field(default=TrainSettings().domain_weight, ge=0)
    balance_weight: float = Field(default=TrainSettings().balance_weight, ge=0)
    z_weight: float = Field(default=TrainSettings().z_weight, ge=0)


class Evaluate(Part):
    """What is measured: `windows` of held-out text a domain, and sets of exact-match problems.

    `problems` names JSONL files of `{"prompt", "answer"}` rows; a set that bears an expert's
    name is also asked of that finetune and that sparse expert.
    """

    windows: int = Field(default=64, ge=1)
    problems: dict[str, str] = {}


class Recipe(Part):
    """A whole build. Relative paths are relative to the recipe file."""

    base: str
    experts: list[Expert] = Field(min_length=2)
    context_length: int = Field(default=512, ge=16)
    calibration_windows: int = Field(default=128, ge=8)
    batch_size: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0)
    prune: Prune = Prune()
    compose: Compose = Compose()
    route: Route = Route()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [expert.name for expert in self.experts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"experts: every name must be used once, but {twice[0]} is twice")
        if self.compose.top_k > len(names):
            raise ValueError(
                f"compose.top_k must be at most the number of experts ({len(names)}), "
                f"but it is {self.compose.top_k}"
            )
        return self

    @property
    def names(self) -> list[str]:
        """The experts' names in order."""
        return [expert.name for expert in self.experts]

    def prune_settings(self) -> PruneSettings:
        """The prune section with the recipe's context length and calibration size."""
        return PruneSettings(
            **self.prune.model_dump(exclude={"recover"}),
            recovery=BlockRecovery() if self.prune.recover else None,
            context_length=self.context_length,
            windows=self.calibration_windows,
            batch_size=self.batch_size,
        )

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """Read a YAML recipe; InputError names the file, the line, the field and the rule."""
        path = Path(path)
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
        try:
            recipe = cls.model_validate(values)
        except pydantic.ValidationError as error:
            raise InputError(_explain(path, tree, error)) from error
        return recipe.resolved(path.parent)

    def resolved(self, folder: Path) -> "Recipe":
        """The same recipe with relative paths that exist below `folder` made absolute."""

        def resolve(value: str) -> str:
            path = folder / Path(value).expanduser()
            return str(path.resolve()) if path.exists() else value

        experts = [
            expert.model_copy(
                update={
                    "model": resolve(expert.model),
                    "domain": Domain(
                        calibration=resolve(expert.domain.calibration),
                        heldout=expert.domain.heldout and resolve(expert.domain.heldout),
                    ),
                }
            )
            for expert in self.experts
        ]
        problems = {name: resolve(path) for name, path in self.evaluate.problems.items()}
        evaluate = self.evaluate.model_copy(update={"problems": problems})
        changes = {"base": resolve(self.base), "experts": experts, "evaluate": evaluate}
        return self.model_copy(update=changes)

    def to_yaml(self) -> str:
        """The recipe as YAML, every field written out."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, width=100)


def _explain(path: Path, tree: Any, error: pydantic.ValidationError) -> str:
    problems = [_problem(tree, detail) for detail in error.errors()]
    return f"{path} is not a valid recipe: " + "; ".join(problems)


def _problem(tree: Any, detail: Any) -> str:
    location = tuple(part for part in detail["loc"] if isinstance(part, str | int))
    field = ".".join(str(part) for part in location)
    line = _line(tree, location)
    if detail["type"] == "extra_forbidden":
        return f"line {line}: unknown field {field}{_nearest(location)}"
    message = detail["msg"].removeprefix("Value error, ")
    got = "" if detail["type"] == "missing" else f", but it is {detail['input']!r}"
    return f"line {line}: {message}" if not field else f"line {line}: {field}: {message}{got}"


def _nearest(location: tuple[str | int, ...]) -> str:
    known = _fields_at(location[:-1])
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def _fields_at(location: tuple[str | int, ...]) -> list[str]:
    sections: dict[str, type[Part]] = {
        "prune": Prune,
        "compose": Compose,
        "route": Route,
        "evaluate": Evaluate,
        "experts": Expert,
        "domain": Domain,
    }
    names = [part for part in location if isinstance(part, str)]
    return list((sections[names[-1]] if names else Recipe).model_fields)


def _line(node: Any, location: tuple[str | int, ...]) -> int:
    """The line (from 1) of the deepest part of `location` that the YAML tree holds."""
    line = node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == part), None)
            if pair is None:
                return line
            line, node = pair[0].start_mark.line + 1, pair[1]
            continue
        line = node.start_mark.line + 1
    return line
