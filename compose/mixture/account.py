"""What of every input is in a mixture and what is not, tensor by tensor."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from moiety.compose.mixture.layout import Layout

NUMBERED = re.compile(r"(?<=^model\.layers\.)\d+(?=\.)")


def accounting(
    layout: Layout, base: Iterable[str], experts: Mapping[str, Iterable[str]]
) -> dict[str, Any]:
    """Where every tensor of the base and of the experts went, by name; JSON-like.

    `base` and `experts` give tensor names, as models do. `shared` are the tensors of the shared
    part, whose values come from where `compose.shared` says; `added` the ones no input has.
    Of each input, `used` are in the mixture as they are, `superseded` ones are replaced (by the
    shared part, or the base's FFNs by the experts), and `unknown` ones are no part of the
    architecture. Layers are written as ranges, `{0-3,7}`.
    """
    layers = [str(layer) for layer in layout.layers]
    places = layout.family.places
    added = [places.stored_gate, *layout.family.neutral]
    return {
        "shared": folded(layout.shared_names),
        "added": folded(name.format(layer=layer) for name in added for layer in layers),
        "base": _of_base(layout, list(base)),
        "experts": {name: _of_expert(layout, list(names)) for name, names in experts.items()},
    }


def _of_base(layout: Layout, names: list[str]) -> dict[str, list[str]]:
    return {
        "superseded": folded(name for name in names if layout.is_expert(name)),
        "unknown": folded(name for name in names if not _is_known(layout, name)),
    }


def _of_expert(layout: Layout, names: list[str]) -> dict[str, list[str]]:
    others = [name for name in names if not layout.is_expert(name)]
    return {
        "used": folded(name for name in names if layout.is_expert(name)),
        "superseded": folded(name for name in others if _is_known(layout, name)),
        "unknown": folded(name for name in others if not _is_known(layout, name)),
    }


def _is_known(layout: Layout, name: str) -> bool:
    """Whether the architecture has a tensor, be it a mask or scales of a packed one."""
    plain = re.sub(r"(?<=weight)(_mask|_scale)$", "", name)
    return layout.is_expert(name) or layout.is_shared(plain)


def folded(names: Iterable[str]) -> list[str]:
    """Names with the numbers of equal layers folded into one, such as `model.layers.{0-3,7}.x`."""
    layers: dict[str, list[int]] = defaultdict(list)
    plain: list[str] = []
    for name in names:
        number = NUMBERED.search(name)
        if number is None:
            plain.append(name)
        else:
            layers[NUMBERED.sub("{}", name)].append(int(number[0]))
    numbered = [name.replace("{}", f"{{{_ranges(each)}}}") for name, each in layers.items()]
    return sorted([*plain, *numbered])


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
