"""What only one kind of composite asks for, and patterns that do not fit the matrices."""

from collections.abc import Iterator
from functools import partial

from moiety.compose.merge import check_merging
from moiety.compose.merged.checks import check_merge
from moiety.compose.mixture import check_mixture
from moiety.compose.preflight.findings import Finding, problems_of
from moiety.compose.preflight.matrices import pruned_matrices
from moiety.compose.recipe import Merge, Mixture, Recipe, Route, Routed
from moiety.compose.recipe.kinds import RouterKind, WithShared
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.device import check_device
from moiety.experts.pattern import Pattern


def check_kind(recipe: Recipe, base: Checkpoint) -> Iterator[Finding]:
    """Whether the base's architecture, the pattern and the merge can be what the recipe asks."""
    kind, sparse = recipe.compose, True
    if isinstance(kind, Mixture):
        yield from problems_of("base", lambda: check_mixture(base.config, kind.layers))
    if isinstance(kind, Routed) and base.config.tie_word_embeddings:
        for field in ("embeddings", "head"):
            if getattr(kind, field) == "routed":
                yield Finding(
                    f"compose.{field}: expected a base with a head of its own for {field}: routed, "
                    "but this one ties it to the embeddings; leave both in the shared part"
                )
    if isinstance(kind, Merge):
        sparse = kind.sparse != "none"
        settings, names = recipe.prune, recipe.names
        yield from problems_of("compose", lambda: check_merge(kind, settings, names))
    if isinstance(kind, WithShared) and not isinstance(kind.shared, str):
        merging = kind.shared
        yield from problems_of("compose.shared", lambda: check_merging(merging, recipe.names))
    if isinstance(kind, Mixture | Routed):
        yield from _route(recipe.route, kind)
    if sparse:
        prunings = [recipe.prune, *(e.prune for e in recipe.experts if e.prune is not None)]
        for device in dict.fromkeys(pruning.device for pruning in prunings):
            yield from problems_of("prune.device", partial(check_device, device))
        yield from _pattern(recipe, base)


def _route(route: Route, kind: Mixture | Routed) -> Iterator[Finding]:
    """Ways of learning that only some gates know."""
    router = kind.router if isinstance(kind, Routed) else RouterKind()
    deltas = isinstance(kind, Routed) and (kind.base, kind.embeddings) == ("dense", "shared")
    if route.init == "arrow" and not (deltas and router.score == "absolute"):
        yield Finding(
            "route.init: arrow looks at the experts' task vectors along directions without a "
            "sign, so it needs kind: routed with base: dense, shared embeddings and router: "
            "{score: absolute}; build it that way or use another init"
        )
    if route.balance == "bias" and route.train_steps and router.kind != "sigmoid":
        yield Finding(
            "route.balance: bias moves the selection bias that gates of kind: routed with router: "
            "{kind: sigmoid} have, but these have none; use loss or none"
        )


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
