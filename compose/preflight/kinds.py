"""What only one kind of composite asks for, and patterns that do not fit the matrices."""

from collections.abc import Iterator
from functools import partial

from moiety.compose.merge import check_merging
from moiety.compose.merged.checks import check_merge
from moiety.compose.mixture import check_mixture
from moiety.compose.preflight.findings import Finding, problems_of
from moiety.compose.preflight.matrices import pruned_matrices
from moiety.compose.recipe import Merge, Mixture, Recipe, Routed
from moiety.compose.recipe.kinds import WithShared
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.pattern import Pattern


def check_kind(recipe: Recipe, base: Checkpoint) -> Iterator[Finding]:
    """Whether the base's architecture, the pattern and the merge can be what the recipe asks."""
    kind, sparse = recipe.compose, True
    if isinstance(kind, Mixture):
        yield from problems_of("base", lambda: check_mixture(base.config, kind.layers))
    if isinstance(kind, Routed) and kind.head == "routed" and base.config.tie_word_embeddings:
        yield Finding(
            "compose.head: expected a head of its own for head: routed, but this base ties it to "
            "the embeddings; route the embeddings, or leave both in the shared part"
        )
    if isinstance(kind, Merge):
        sparse = kind.sparse != "none"
        settings, names = recipe.prune, recipe.names
        yield from problems_of("compose", lambda: check_merge(kind, settings, names))
    if isinstance(kind, WithShared) and not isinstance(kind.shared, str):
        merging = kind.shared
        yield from problems_of("compose.shared", lambda: check_merging(merging, recipe.names))
    if sparse:
        yield from _pattern(recipe, base)


def _pattern(recipe: Recipe, base: Checkpoint) -> Iterator[Finding]:
    try:
        matrices = pruned_matrices(base.config, recipe.sites)
    except InputError as error:
        yield Finding(f"base: {error}")
        return
    if not matrices:
        yield Finding(
            f"prune.sites: expected linear layers at {recipe.sites}, but the base has none; "
            "name others"
        )
    for pattern in map(Pattern.parse, recipe.patterns):
        for width in sorted({columns for _, columns in matrices.values()}):
            fits = partial(pattern.check_width, width)
            yield from problems_of("prune.pattern", fits)
