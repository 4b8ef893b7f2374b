"""Many experts into one model: recipes, merges, mixtures, builds."""

from moiety.compose.build import BuildReport, build, default_work
from moiety.compose.composite import Composite, open_composite
from moiety.compose.recipe import Recipe
from moiety.compose.route import RouteReport, route

__all__ = [
    "BuildReport",
    "Composite",
    "Recipe",
    "RouteReport",
    "build",
    "default_work",
    "open_composite",
    "route",
]
