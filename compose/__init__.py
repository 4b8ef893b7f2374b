"""Many experts into one model: recipes, merges, mixtures, routed models, ensembles, builds.

Names are looked up when first asked for: opening a composite does not load what builds one.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moiety.compose.building import build, default_work
    from moiety.compose.composite import Composite, open_composite
    from moiety.compose.editing import edit
    from moiety.compose.learning import RouteReport, route
    from moiety.compose.opening import open_any
    from moiety.compose.recipe import Recipe
    from moiety.compose.report import BuildReport

__all__ = [
    "BuildReport",
    "Composite",
    "Recipe",
    "RouteReport",
    "build",
    "default_work",
    "edit",
    "open_any",
    "open_composite",
    "route",
]

_PLACES = {
    "BuildReport": "report",
    "build": "building",
    "default_work": "building",
    "edit": "editing",
    "open_any": "opening",
    "Composite": "composite",
    "open_composite": "composite",
    "Recipe": "recipe",
    "RouteReport": "learning",
    "route": "learning",
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
