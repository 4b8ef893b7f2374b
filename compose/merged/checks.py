"""What can be refused of a recipe's merge before any work."""

from collections.abc import Sequence

from moiety.compose.merge import check_merging
from moiety.compose.merge.properties import coefficients, depends_on_weight, keeps_zeros
from moiety.compose.recipe import Merge, Merging, Prune
from moiety.errors import InputError
from moiety.experts.pattern import Pattern

PROBED_WEIGHT = 0.5
"""Stands for a weight that is yet to be chosen."""


def check_merge(settings: Merge, prune: Prune, names: Sequence[str]) -> None:
    """Raise InputError when the finetunes `names` cannot be merged in this way.

    What the sparse modes need of a method is found out by asking it (see merge.properties).
    """
    merging = settings.merging(PROBED_WEIGHT if settings.chooses_weight else None)
    check_merging(merging, names)
    if settings.chooses_weight and not depends_on_weight(merging, names):
        raise InputError(
            f"compose.parameters.weight cannot be auto for {settings.method}, whose result does "
            "not depend on a weight that all finetunes share; give weights"
        )
    if settings.sparse != "none" and Pattern.parse(prune.pattern).is_dense:
        raise InputError(
            f"compose.sparse is {settings.sparse}, but prune.pattern is dense; "
            "give a pattern such as 2:4, or sparse: none"
        )
    if settings.sparse == "shared_mask":
        _check_shared_mask(merging, names)
    if settings.sparse == "conflict_aware":
        _check_conflict_aware(merging, prune, names)


def _check_shared_mask(merging: Merging, names: Sequence[str]) -> None:
    if not keeps_zeros(merging, names):
        raise InputError(
            f"compose.sparse: shared_mask needs a method that leaves zero what is zero in all "
            f"models, but {merging.method} with these parameters does not; use reprune"
        )


def _check_conflict_aware(merging: Merging, prune: Prune, names: Sequence[str]) -> None:
    try:
        coefficients(merging, names)
    except InputError as error:
        raise InputError(f"compose.sparse: conflict_aware: {error}; use reprune") from error
    if prune.recover:
        raise InputError(
            "prune.recover trains whole weights, but compose.sparse: conflict_aware stores "
            "differences to the base; set recover: false"
        )
