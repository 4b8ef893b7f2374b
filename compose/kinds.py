"""Which builder makes which kind of composite."""

from moiety.compose.builder import Builder
from moiety.compose.mixture import MixtureBuilder
from moiety.compose.recipe import Recipe
from moiety.compose.stages import Stages
from moiety.progress import SILENT, Progress

BUILDERS: dict[str, type[Builder]] = {"mixture": MixtureBuilder}


def builder_of(recipe: Recipe, stages: Stages, progress: Progress = SILENT) -> Builder:
    """The builder of a recipe's kind."""
    return BUILDERS[recipe.compose.kind](recipe, stages, progress)
