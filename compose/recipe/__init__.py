"""Recipes: what to compose, from what, in one YAML file or the same as Python objects."""

from moiety.compose.recipe.init import NewRecipe, init_recipe
from moiety.compose.recipe.kinds import Compose, Ensemble, Merge, Merging, Mixture, Routed
from moiety.compose.recipe.recipe import Recipe
from moiety.compose.recipe.sections import Domain, Evaluate, Expert, Part, Prune, Route

__all__ = [
    "Compose",
    "Domain",
    "Ensemble",
    "Evaluate",
    "Expert",
    "Merge",
    "Merging",
    "Mixture",
    "NewRecipe",
    "Part",
    "Prune",
    "Recipe",
    "Route",
    "Routed",
    "init_recipe",
]
