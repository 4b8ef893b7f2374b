"""What of every input is in a mixture and what is not, tensor by tensor."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moiety.compose.account import Use, account, folded
from moiety.compose.mixture.layout import Layout


def accounting(
    layout: Layout,
    base: Iterable[str],
    experts: Mapping[str, Iterable[str]],
    shared: Callable[[str | None], Use],
) -> dict[str, Any]:
    """Where every tensor of the base and of the experts went, by name; JSON-like.

    `base` and `experts` give tensor names, as models do; `shared` says what became of the shared
    part of the base (None) or an expert. In the result `shared` are the tensors of the mixture's
    shared part, `added` the ones no input has. Layers are written as ranges, `{0-3,7}`.
    """
    layers = [str(layer) for layer in layout.layers]
    places = layout.family.places
    added = [places.stored_gate, *layout.family.neutral]

    def of(owner: str | None, names: Iterable[str]) -> dict[str, list[str]]:
        own: Use = "superseded" if owner is None else "used"
        return account(names, lambda name: _use(layout, name, own, shared(owner)))

    return {
        "shared": folded(layout.shared_names),
        "added": folded(name.format(layer=layer) for name in added for layer in layers),
        "base": of(None, base),
        "experts": {name: of(name, names) for name, names in experts.items()},
    }


def _use(layout: Layout, name: str, own: Use, shared: Use) -> Use:
    """`own` for matrices of experts, be they packed, `shared` for the rest."""
    if layout.is_expert(name):
        return own
    return (
        shared if layout.is_shared(re.sub(r"(?<=weight)(_mask|_scale)$", "", name)) else "unknown"
    )
