"""A whole recipe: what to compose, from what, and how it is measured."""

from pathlib import Path

import pydantic
import yaml
from pydantic import Field, model_validator

from moiety.compose.recipe.kinds import Compose, Mixture, Routed, WithShared
from moiety.compose.recipe.reading import explain, read_yaml
from moiety.compose.recipe.sections import Domain, Evaluate, Expert, Part, Prune, Route
from moiety.errors import InputError
from moiety.experts.recovery.block import BlockRecovery
from moiety.experts.settings import PruneSettings


class Recipe(Part):
    """A whole build. Relative paths are relative to the recipe file."""

    base: str
    experts: list[Expert] = Field(min_length=2)
    context_length: int = Field(default=512, ge=16)
    calibration_windows: int = Field(default=128, ge=8)
    batch_size: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0)
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
        if isinstance(kind, Mixture | Routed) and kind.top_k > len(names):
            raise ValueError(
                f"compose.top_k must be at most the number of experts ({len(names)}), "
                f"but it is {kind.top_k}"
            )
        if isinstance(kind, WithShared):
            kind.check(names)
        if isinstance(kind, Mixture) and self.sites != "ffn":
            raise ValueError(
                "prune.sites must be ffn for kind mixture, whose experts are FFNs, but it is "
                f"{self.sites!r}; kind routed holds the rest too"
            )
        return self

    @property
    def names(self) -> list[str]:
        """The experts' names in order."""
        return [expert.name for expert in self.experts]

    @property
    def sites(self) -> str:
        """What is pruned: as stated, else FFNs for a mixture and every linear for the rest."""
        return self.prune.sites or ("ffn" if self.compose.kind == "mixture" else "all")

    def prune_settings(self) -> PruneSettings:
        """The prune section with the recipe's context length and calibration size."""
        return PruneSettings(
            **self.prune.model_dump(exclude={"recover", "sites"}),
            sites=self.sites,
            recovery=BlockRecovery() if self.prune.recover else None,
            context_length=self.context_length,
            windows=self.calibration_windows,
            batch_size=self.batch_size,
        )

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """Read a YAML recipe; InputError names the file, the line, the field and the rule."""
        path = Path(path)
        tree, values = read_yaml(path)
        try:
            recipe = cls.model_validate(values)
        except pydantic.ValidationError as error:
            raise InputError(explain(path, tree, error, cls)) from error
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
