"""Which builder makes which kind of composite."""

from moiety.compose.builder import Builder
from moiety.compose.ensemble.builder import EnsembleBuilder
from moiety.compose.merged import MergeBuilder
from moiety.compose.mixture import MixtureBuilder
from moiety.compose.recipe import Recipe
from moiety.compose.routed.builder import RoutedBuilder
from moiety.compose.stages import Stages
from moiety.progress import SILENT, Progress

BUILDERS: dict[str, type[Builder]] = {
    "mixture": MixtureBuilder,
    "routed": RoutedBuilder,
    "merge": MergeBuilder,
    "ensemble": EnsembleBuilder,
}


def builder_of(recipe: Recipe, stages: Stages, progress: Progress = SILENT) -> Builder:
    """The builder of a recipe's kind."""
    return BUILDERS[recipe.compose.kind](recipe, stages, progress)
