"""Commands that turn many experts into one model: recipe, build, route."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moiety.commands.common import (
    PIPELINE,
    Json,
    app,
    pairs,
    quiet_libraries,
    show,
)
from moiety.console import ConsoleProgress
from moiety.errors import InputError

if TYPE_CHECKING:
    from moiety.analysis.tables import Table
    from moiety.compose import BuildReport, Recipe
    from moiety.compose.recipe import Expert


LABELS = {"shared": "shared part from", "gate_parameters": "trainable parameters (the gates)"}
recipe_app = typer.Typer(
    no_args_is_help=True, help="Recipes: what to compose, from what, in one file."
)
app.add_typer(recipe_app, name="recipe", rich_help_panel=PIPELINE)
SomeData = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="NAME=FILE", help="An expert's calibration text; repeat."),
]
SomeHeldout = Annotated[
    list[str] | None,
    typer.Option("--heldout", metavar="NAME=FILE", help="An expert's held-out text; repeat."),
]
Measure = Annotated[
    bool, typer.Option(help="Measure it with all controls, if held-out text is given.")
]


@recipe_app.callback()
def _recipes() -> None:
    """Keeps `init` a command of its own while it is the only one."""


@recipe_app.command()
def init(
    models: Annotated[list[str], typer.Argument(help="Finetunes: folders, hub ids, adapters.")],
    out: Annotated[Path, typer.Option(help="New recipe, a YAML file.")],
    base: Annotated[
        str | None, typer.Option(help="Their base; default: what their own files name.")
    ] = None,
    kind: Annotated[str, typer.Option(help="mixture, routed, merge or ensemble.")] = "mixture",
    data: SomeData = None,
    heldout: SomeHeldout = None,
    as_json: Json = False,
) -> None:
    """Write a recipe with every setting explained, to start from."""
    from moiety.compose.recipe import init_recipe

    quiet_libraries()
    calibration, measured = pairs(data or []), pairs(heldout or [], "--heldout")
    made = init_recipe(models, out, base=base, kind=kind, data=calibration, heldout=measured)
    progress = ConsoleProgress()
    for told in made.notes:
        progress.note(f"note: {told}")
    progress.note(f"wrote {out}")
    if as_json:
        show(made.to_dict(), [], as_json)


@app.command(rich_help_panel=PIPELINE)
def build(
    recipe: Annotated[Path, typer.Argument(help="Recipe, or a mergekit file; YAML.")],
    out: Annotated[Path, typer.Option(help="New folder for the composite.")],
    work: Annotated[Path | None, typer.Option(help="Stages; default: OUT.stages.")] = None,
    data: SomeData = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan and stop.")
    ] = False,
    measure: Measure = True,
    check: Annotated[
        bool, typer.Option(help="Check on these models what must hold of any composite.")
    ] = True,
    as_json: Json = False,
) -> None:
    """A recipe to a composite; started again after an interruption, it goes on."""
    from moiety.compose import Recipe, default_work
    from moiety.compose import build as run
    from moiety.compose.building import check_out

    quiet_libraries()
    read, work, progress = Recipe.read(recipe), work or default_work(out), ConsoleProgress()
    read = read.with_data(pairs(data or []))
    if dry_run:
        check_out(out)
        _dry_run(read, work, progress, as_json)
        return
    report = run(read, out, work=work, check=check, progress=progress)
    _tell(read, report, work, progress, measure=measure, as_json=as_json)


def _tell(
    recipe: "Recipe",
    report: "BuildReport",
    work: Path,
    progress: ConsoleProgress,
    *,
    measure: bool,
    as_json: bool,
) -> None:
    """Measure a built composite if asked, finish its card, show all of it."""
    from moiety.analysis.controls import evaluate_build
    from moiety.analysis.tables import Table, controls_table, resources_table
    from moiety.compose.card import write_card

    values, facts = report.to_dict(), report.facts
    rows = [
        ("kind", report.kind),
        *(
            (LABELS.get(name, name.replace("_", " ")), str(value))
            for name, value in facts.items()
            if not isinstance(value, dict | list)
        ),
        *((f"seconds, {stage}", f"{seconds:.1f}") for stage, seconds in report.seconds.items()),
    ]
    title = f"composite in {report.composite}"
    tables = [Table(title=title, columns=("", ""), rows=tuple(rows))]
    tables.append(_tensors_table(facts["tensors"]))
    if report.invariants:
        tables.append(_invariants_table(report.invariants))
    unmeasured = [expert.name for expert in recipe.experts if not expert.domain.heldout]
    if measure and unmeasured:
        progress.note(f"not measured: no held-out text is given for {', '.join(unmeasured)}")
    elif measure:
        values["results"] = results = evaluate_build(recipe, report.composite, work, progress)
        write_card(report.composite, recipe, report, results, report.invariants)
        tables.append(controls_table(results))
        if results["accuracy"]:
            tables.append(controls_table(results, "accuracy"))
        tables.append(resources_table(results))
    show(values, tables, as_json)


def _tensors_table(tensors: dict[str, Any]) -> "Table":
    from moiety.analysis.tables import Table
    from moiety.compose.account import USES, counts

    rows = tuple(
        (owner, *(str(by_use[use]) for use in USES)) for owner, by_use in counts(tensors).items()
    )
    note = "By name in build.json; unknown ones are no part of the architecture."
    return Table(title="Tensors of every input", columns=("of", *USES), rows=rows, note=note)


def _invariants_table(invariants: list[dict[str, Any]]) -> "Table":
    from moiety.analysis.tables import Table

    rows = tuple(
        (one["statement"], f"{one['difference']:.1e}", "yes" if one["holds"] else "NO")
        for one in invariants
    )
    columns = ("checked on these models, in fp32", "difference", "holds")
    return Table(title="Invariants", columns=columns, rows=rows)


def _dry_run(recipe: "Recipe", work: Path, progress: ConsoleProgress, as_json: bool) -> None:
    """The notes and the plan of a build, or why it would be refused."""
    from moiety.analysis.tables import Table, size
    from moiety.compose.plan import COLUMNS, plan
    from moiety.compose.preflight import preflight

    notes = preflight(recipe)
    for told in notes:
        progress.note(f"note: {told}")
    planned = plan(recipe, work)
    table = Table(
        title=f"plan ({planned.kind}), stages in {work}",
        columns=COLUMNS,
        rows=tuple(planned.rows()),
        note=f"The finetunes take {size(planned.dense_bytes)} dense, the composite "
        f"{size(planned.composite_bytes)}. Memory and time are estimates.",
    )
    show({**planned.to_dict(), "notes": notes}, [table], as_json)


@app.command(rich_help_panel=PIPELINE)
def edit(
    model: Annotated[Path, typer.Argument(help="Folder of a composite.")],
    out: Annotated[Path, typer.Option(help="New folder for the changed composite.")],
    add: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="Add a finetune; repeat.")
    ] = None,
    data: SomeData = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave an expert out; repeat.")
    ] = None,
    replace: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="Another model; repeat.")
    ] = None,
    reprune: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Prune it anew as --set says; repeat.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Such as method=alps; repeat."),
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Stages; default: MODEL.stages.")] = None,
    heldout: SomeHeldout = None,
    measure: Measure = True,
    as_json: Json = False,
) -> None:
    """Add, remove, replace or re-prune experts; the others are not pruned again."""
    from moiety.compose import Recipe, default_work
    from moiety.compose import edit as run
    from moiety.compose.editing import pruned_anew

    quiet_libraries()
    if bool(reprune) != bool(settings):
        raise InputError(
            "expected --reprune NAME together with --set FIELD=VALUE, such as --reprune law "
            "--set method=alps, but only one of them is given; other text alone is --data NAME=FILE"
        )
    added, texts = pairs(add or [], "--add"), pairs(data or [])
    measured = pairs(heldout or [], "--heldout")
    work, progress = work or default_work(model), ConsoleProgress()
    report = run(
        model,
        out,
        add=_added(added, texts, measured),
        remove=remove or [],
        replace=pairs(replace or [], "--replace"),
        prune=pruned_anew(model, reprune or [], pairs(settings or [], "--set")),
        data={name: path for name, path in texts.items() if name not in added},
        heldout={name: path for name, path in measured.items() if name not in added},
        work=work,
        progress=progress,
    )
    recipe = Recipe.read(report.composite / "recipe.yaml")
    _tell(recipe, report, work, progress, measure=measure, as_json=as_json)


def _added(
    models: dict[str, str], texts: dict[str, str], measured: dict[str, str]
) -> list["Expert"]:
    """Experts by their names' model, calibration and held-out text."""
    from moiety.compose.recipe import Domain, Expert

    return [
        Expert(
            name=name,
            model=path,
            domain=Domain(calibration=texts.get(name), heldout=measured.get(name)),
        )
        for name, path in models.items()
    ]
