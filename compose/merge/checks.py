"""What can be refused of a merge before any work: too many models, parameters that do not exist.

mergekit's methods know their contracts and parameters; its own refusals come late and speak of
its inputs, not of the recipe.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from mergekit.merge_methods import ParameterScope

from moiety.compose.merge.roles import roles, spec_of
from moiety.compose.recipe import Merging
from moiety.errors import InputError


def check_merging(merging: Merging, names: Sequence[str]) -> None:
    """Raise InputError unless the method takes these finetunes and these parameters.

    `names` are the experts' names, in order; parameters by name must name each of them.
    """
    method, spec = merging.method, spec_of(merging.method)
    base, inputs = roles(method, names)
    try:
        spec.contract.validate_ids(inputs, base)
    except ValueError as error:
        counted = " (the base is one of its inputs)" if base else ""
        raise InputError(
            f"{method} cannot merge {len(names)} finetunes ({', '.join(names)}): "
            f"{error}{counted}; choose another method or other experts"
        ) from error
    known = {parameter.name: parameter for parameter in spec.parameters}
    for name in merging.parameters:
        if name not in known:
            listed = ", ".join(known) or "none at all"
            raise InputError(
                f"{method} has no parameter {name}; it has {listed}; remove or rename it"
            )
    for name, parameter in known.items():
        if name in merging.parameters:
            _check_values(method, parameter, merging.parameters[name], names)
        elif parameter.required:
            raise InputError(
                f"{method} needs the parameter {name}, but it has none; give "
                f"{'a number' if parameter.scope is ParameterScope.SHARED else 'one number, or one for each expert by name'}"
            )
    _check_sums(merging, names)
    _check_della(merging, names)


def _check_values(method: str, parameter: Any, value: Any, names: Sequence[str]) -> None:
    what = f"{method}'s parameter {parameter.name}"
    if isinstance(value, Mapping):
        if parameter.scope is ParameterScope.SHARED:
            raise InputError(f"{what} is one value for the whole merge, but it is given by expert")
        strange = sorted(set(value) ^ set(names))
        if strange:
            problem = "no expert" if strange[0] in value else "an expert without a value"
            raise InputError(
                f"{what} must have one value for each of {', '.join(names)}, "
                f"but {strange[0]} is {problem}"
            )
    for one in value.values() if isinstance(value, Mapping) else [value]:
        try:
            parameter.validate(one)
        except pydantic.ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise InputError(f"{what} is {one!r}: {reason}") from error
        if isinstance(one, float) and not math.isfinite(one):
            raise InputError(f"{what} must be finite, but it is {one}")
        if parameter.name == "density" and not 0 < one <= 1:
            raise InputError(f"{what} must be above 0 and at most 1, but it is {one:g}")


def of_each(merging: Merging, parameter: str, names: Sequence[str]) -> dict[str, Any]:
    """A parameter's value for every finetune, mergekit's default if it is not given."""
    [spec] = [one for one in spec_of(merging.method).parameters if one.name == parameter]
    value = merging.parameters.get(parameter, spec.default)
    return dict(value) if isinstance(value, Mapping) else dict.fromkeys(names, value)


def _check_sums(merging: Merging, names: Sequence[str]) -> None:
    """Weights that are divided by their sum must have one."""
    known = {parameter.name for parameter in spec_of(merging.method).parameters}
    for switch in ("normalize", "normalize_weights"):
        if {"weight", switch} <= known and of_each(merging, switch, [""])[""]:
            total = sum(of_each(merging, "weight", names).values())
            if abs(total) < 1e-8:
                raise InputError(
                    f"{merging.method} divides by the sum of its weights, but that is {total:g}; "
                    f"give other weights or {switch}: false"
                )


def _check_della(merging: Merging, names: Sequence[str]) -> None:
    known = {parameter.name for parameter in spec_of(merging.method).parameters}
    if not {"density", "epsilon"} <= known:
        return
    densities = of_each(merging, "density", names)
    epsilons = of_each(merging, "epsilon", names)
    for name in names:
        density, epsilon = densities[name], epsilons[name]
        if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise InputError(
                f"{merging.method} drops with probabilities from density - epsilon to density + "
                f"epsilon, which must lie between 0 and 1, but {name} has density {density:g} and "
                f"epsilon {epsilon:g}; lower epsilon"
            )
