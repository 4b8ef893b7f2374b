"""What of every input is in a composite and what is not, tensor by tensor.

Of each input, `used` tensors are in the composite as they are or pruned, `merged` ones in a sum
with others, `superseded` ones have another's in their place, and `unknown` ones are no part of
the architecture: transformers does not read them either.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

NUMBERED = re.compile(r"(?<=^model\.layers\.)\d+(?=\.)")
Use = Literal["used", "merged", "superseded", "unknown"]
USES: tuple[Use, ...] = ("used", "merged", "superseded", "unknown")


def account(names: Iterable[str], use: Callable[[str], Use]) -> dict[str, list[str]]:
    """Tensors' names by what became of them, equal layers folded into one."""
    found: dict[str, list[str]] = {use: [] for use in USES}
    for name in names:
        found[use(name)].append(name)
    return {use: folded(each) for use, each in found.items() if each or use == "unknown"}


def counts(tensors: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """How many tensors of every input went where, of a build report's `tensors`."""
    inputs = {"base": tensors["base"], **tensors["experts"]}
    return {
        owner: {use: sum(map(_stands_for, by_use.get(use, ()))) for use in USES}
        for owner, by_use in inputs.items()
    }


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


def _stands_for(name: str) -> int:
    """How many tensors a folded name stands for."""
    found = re.search(r"\{([\d,-]+)\}", name)
    if found is None:
        return 1
    runs = [run.split("-") for run in found[1].split(",")]
    return sum(int(run[-1]) - int(run[0]) + 1 for run in runs)
