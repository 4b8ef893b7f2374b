"""Change the experts of a composite that exists: add, remove, replace, prune again."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pydantic

from moiety.compose.building import build, default_work
from moiety.compose.recipe import Expert, Prune, Recipe
from moiety.compose.report import BuildReport
from moiety.errors import InputError
from moiety.progress import SILENT, Progress


def edit(
    composite: str | Path,
    out: str | Path,
    *,
    add: Sequence[Expert] = (),
    remove: Sequence[str] = (),
    replace: Mapping[str, str] | None = None,
    prune: Prune | Mapping[str, Prune] | None = None,
    data: Mapping[str, str] | None = None,
    heldout: Mapping[str, str] | None = None,
    work: str | Path | None = None,
    progress: Progress = SILENT,
) -> BuildReport:
    """Build the composite in folder `composite` anew in `out`, with other experts.

    `add` appends experts, `remove` names those to leave out, `replace` gives some another model
    (their text stays), `prune` has all pruned anew, or those it names, `data` gives some other
    calibration text, which prunes them anew too, `heldout` other text to be measured on. All other
    experts are taken from the stages that the composite was built in (`work`, by default beside
    it) and not pruned again; the gates and the choice of the shared part are learned again, as
    they hang on all experts. The composite itself stays
    as it is. Raises InputError when a name is unknown or taken, or too few experts are left.
    """
    recipe = _recipe_of(composite).with_data(data or {}, heldout)
    changed = _changed(recipe, add, remove, replace or {}, prune)
    work = default_work(composite) if work is None else Path(work)
    return build(changed, out, work=work, progress=progress)


def pruned_anew(
    composite: str | Path, names: Sequence[str], settings: Mapping[str, str]
) -> dict[str, Prune]:
    """How each of the experts named is pruned now, with some settings changed; for `edit`.

    InputError when there is no such expert or setting.
    """
    recipe = _recipe_of(composite)
    now = {expert.name: expert.prune or recipe.prune for expert in recipe.experts}
    _check_known(names, recipe)
    try:
        return {
            name: Prune.model_validate({**now[name].model_dump(), **settings}) for name in names
        }
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"prune.{first['loc'][0]}: {reason}") from error


def _recipe_of(composite: str | Path) -> Recipe:
    """What a composite was built from; InputError where there is none."""
    file = Path(composite) / "recipe.yaml"
    if not file.is_file():
        raise InputError(
            f"expected a composite with its recipe at {composite}, but there is no {file.name}; "
            "give a folder that moiety build made"
        )
    return Recipe.read(file)


def _check_known(names: Iterable[str], recipe: Recipe) -> None:
    unknown = sorted(set(names) - set(recipe.names))
    if unknown:
        raise InputError(
            f"expected names of the composite's experts ({', '.join(recipe.names)}), "
            f"but got {', '.join(unknown)}"
        )


def _changed(
    recipe: Recipe,
    add: Sequence[Expert],
    remove: Sequence[str],
    replace: Mapping[str, str],
    prune: Prune | Mapping[str, Prune] | None,
) -> Recipe:
    own: Mapping[str, Prune] = prune if isinstance(prune, Mapping) else {}
    _check_known({*remove, *replace, *own}, recipe)
    kept = [
        expert.model_copy(
            update={
                "model": replace.get(expert.name, expert.model),
                "prune": None if isinstance(prune, Prune) else own.get(expert.name, expert.prune),
            }
        )
        for expert in recipe.experts
        if expert.name not in remove
    ]
    values = recipe.model_dump(exclude={"experts", "prune"}, exclude_none=True)
    values["experts"] = [expert.model_dump(exclude_none=True) for expert in (*kept, *add)]
    everyone = prune if isinstance(prune, Prune) else recipe.prune
    values["prune"] = everyone.model_dump(exclude_none=True)
    try:
        return Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"the composite cannot be changed so: {reason}") from error
