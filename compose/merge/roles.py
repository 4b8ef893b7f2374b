"""Who is who in a merge: which models a method takes, and which of them is its base."""

from collections.abc import Sequence

from mergekit.merge_methods import BasePolicy, MergeMethodSpec, get

BASE = "<base>"
"""Cannot collide with the name of a finetune."""


def spec_of(method: str) -> MergeMethodSpec:
    """What mergekit says of a method: its parameters and how many models it takes."""
    return get(method).spec


def roles(method: str, names: Sequence[str]) -> tuple[str | None, list[str]]:
    """The input that is the method's base (None: it takes none) and all its inputs in order.

    A method that knows a base gets the models' own. Those that go from one model to one other
    (slerp, nearswap, arcee_fusion) go from the base to the finetune, or, given two finetunes,
    from the first to the second.
    """
    contract = spec_of(method).contract
    if contract.base in (BasePolicy.IGNORED, BasePolicy.FORBIDDEN):
        return None, list(names)
    if contract.base is BasePolicy.REQUIRED and contract.max_inputs == len(names) == 2:
        return names[0], list(names)
    return BASE, [BASE, *names]
