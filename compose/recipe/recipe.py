"""A whole recipe: what to compose, from what, and how it is measured."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import Field, model_validator

from moiety.compose.recipe.kinds import Compose, Ensemble, Merge, Mixture, Routed, WithShared
from moiety.compose.recipe.mergekit import is_mergekit, translate
from moiety.compose.recipe.reading import explain, read_yaml
from moiety.compose.recipe.sections import Domain, Evaluate, Expert, Part, Prune, Route
from moiety.errors import InputError
from moiety.experts.recovery.block import BlockRecovery
from moiety.experts.settings import PruneSettings


class Recipe(Part):
    """A whole build. Relative paths are relative to the recipe file."""

    base: str
    """the model that all experts were finetuned from: a folder or a hub id"""
    experts: list[Expert] = Field(min_length=1)
    """the finetunes, at least two; a merge may be of one"""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """null: any; else what the base must be stored in, as nothing is converted"""
    tokenizer: Literal["base", "union"] = "base"
    """base: the one that all models have; union: mergekit first gives every model all their tokens"""
    context_length: int = Field(default=512, ge=16)
    """tokens in a window of text"""
    calibration_windows: int = Field(default=128, ge=8)
    """windows of calibration text a domain, at most"""
    batch_size: int = Field(default=8, ge=1)
    """windows that go through a model at a time"""
    seed: int = Field(default=0, ge=0)
    """seed of every random choice"""
    prune: Prune = Prune()
    compose: Compose = Mixture()
    route: Route = Route()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = self.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"experts: every name must be used once, but {twice[0]} is twice")
        kind = self.compose
        if len(names) < 2 and not isinstance(kind, Merge):
            raise ValueError(f"experts: kind {kind.kind} needs at least 2, but there is 1")
        if isinstance(kind, Mixture | Routed) and kind.top_k > len(names):
            raise ValueError(
                f"compose.top_k must be at most the number of experts ({len(names)}), "
                f"but it is {kind.top_k}"
            )
        if isinstance(kind, WithShared):
            kind.check(names)
        if isinstance(kind, Ensemble):
            _check_named("compose.prior", kind.prior, names)
        for expert in self.experts:
            self._check_own_pruning(expert)
        if isinstance(kind, Mixture) and self.sites != "ffn":
            raise ValueError(
                "prune.sites must be ffn for kind mixture, whose experts are FFNs, but it is "
                f"{self.sites!r}; kind routed holds the rest too"
            )
        return self

    def _check_own_pruning(self, expert: Expert) -> None:
        """An expert's own settings, as far as the kind lets experts differ."""
        if expert.prune is None:
            return
        if isinstance(self.compose, Merge):
            raise ValueError(
                f"expert {expert.name} cannot have its own prune in kind merge, whose result is "
                "pruned once; leave it out"
            )
        own, alike = self._pruning_of(expert), ["values"]
        if not isinstance(self.compose, Ensemble):
            alike += ["pattern", "sites"]
        for field in alike:
            ours, theirs = getattr(self._pruning_of(None), field), getattr(own, field)
            if ours != theirs:
                raise ValueError(
                    f"expert {expert.name}: prune.{field} must be the recipe's ({ours}) in kind "
                    f"{self.compose.kind}, which packs all experts alike, but it is {theirs}"
                )

    def _pruning_of(self, expert: Expert | None) -> Prune:
        """The recipe's section `prune`, or an expert's own, with the sites that it means."""
        own = self.prune if expert is None or expert.prune is None else expert.prune
        return own.model_copy(update={"sites": own.sites or self.sites})

    @property
    def names(self) -> list[str]:
        """The experts' names in order."""
        return [expert.name for expert in self.experts]

    @property
    def needs_text(self) -> bool:
        """Whether building needs calibration text: all does but a dense merge of given weights."""
        kind = self.compose
        return not (isinstance(kind, Merge) and kind.sparse == "none" and not kind.chooses_weight)

    @property
    def sites(self) -> str:
        """What is pruned: as stated, else FFNs for a mixture and every linear for the rest."""
        return self.prune.sites or ("ffn" if self.compose.kind == "mixture" else "all")

    @property
    def patterns(self) -> list[str]:
        """Every pattern that an expert is pruned to."""
        return list(dict.fromkeys(self._pruning_of(expert).pattern for expert in self.experts))

    def prune_settings(self, expert: Expert | None = None) -> PruneSettings:
        """An expert's own prune section, or the recipe's, with its context and calibration size."""
        own = self._pruning_of(expert)
        return PruneSettings(
            **own.model_dump(exclude={"recover"}),
            recovery=BlockRecovery() if own.recover else None,
            context_length=self.context_length,
            windows=self.calibration_windows,
            batch_size=self.batch_size,
        )

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """Read a YAML recipe; InputError names the file, the line, the field and the rule.

        A file of mergekit-yaml or mergekit-moe is translated; see docs/recipes.md.
        """
        path = Path(path)
        tree, values = read_yaml(path)
        if is_mergekit(values):
            values = translate(path, tree, values)
        try:
            recipe = cls.model_validate(values)
        except pydantic.ValidationError as error:
            raise InputError(explain(path, tree, error, cls)) from error
        return recipe.resolved(path.parent)

    def with_data(
        self, calibration: Mapping[str, str], heldout: Mapping[str, str] | None = None
    ) -> "Recipe":
        """The same recipe with other text for the experts named; InputError for another name."""
        heldout = heldout or {}
        for given in (calibration, heldout):
            if unknown := sorted(set(given) - set(self.names)):
                raise InputError(
                    f"expected text for the experts {', '.join(self.names)}, "
                    f"but {unknown[0]} is none of them"
                )

        def changed(expert: Expert) -> Expert:
            text: dict[str, Any] = {}
            if expert.name in calibration:
                text = {"calibration": calibration[expert.name], "prompts": ()}
            if expert.name in heldout:
                text["heldout"] = heldout[expert.name]
            return expert.model_copy(update={"domain": expert.domain.model_copy(update=text)})

        return self.model_copy(update={"experts": [changed(expert) for expert in self.experts]})

    def resolved(self, folder: Path) -> "Recipe":
        """The same recipe with relative paths that exist below `folder` made absolute."""

        def resolve(value: str) -> str:
            path = folder / Path(value).expanduser()
            return str(path.resolve()) if path.exists() else value

        def text(domain: Domain) -> Domain:
            named = {"calibration": domain.calibration, "heldout": domain.heldout}
            changes = {kind: path and resolve(path) for kind, path in named.items()}
            return domain.model_copy(update=changes)

        experts = [
            expert.model_copy(
                update={"model": resolve(expert.model), "domain": text(expert.domain)}
            )
            for expert in self.experts
        ]
        problems = {name: resolve(path) for name, path in self.evaluate.problems.items()}
        evaluate = self.evaluate.model_copy(update={"problems": problems})
        changes = {"base": resolve(self.base), "experts": experts, "evaluate": evaluate}
        return self.model_copy(update=changes)

    def to_yaml(self) -> str:
        """The recipe as YAML, every field written out."""
        values = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(values, sort_keys=False, width=100)


def _check_named(field: str, given: Iterable[str], names: list[str]) -> None:
    """Weights that are given at all must be given for every expert and for nobody else."""
    given = set(given)
    if unknown := sorted(given - set(names)):
        raise ValueError(
            f"{field} must be by the experts' names ({', '.join(names)}), but it has {unknown[0]!r}"
        )
    if given and (silent := [name for name in names if name not in given]):
        raise ValueError(f"{field} must name every expert, but {silent[0]} has none")
