"""Commands that turn many experts into one model: build, route."""

from pathlib import Path
from typing import Annotated

import typer

from moiety.commands.common import (
    PIPELINE,
    Context,
    Data,
    Json,
    Seed,
    app,
    pairs,
    quiet_libraries,
    show,
)
from moiety.console import ConsoleProgress
from moiety.errors import InputError


@app.command(rich_help_panel=PIPELINE)
def build(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    out: Annotated[Path, typer.Option(help="New folder for the composite.")],
    work: Annotated[Path | None, typer.Option(help="Stages; default: OUT.stages.")] = None,
    measure: Annotated[
        bool, typer.Option(help="Measure it with all controls, if held-out text is given.")
    ] = True,
    as_json: Json = False,
) -> None:
    """A recipe to a composite; started again after an interruption, it goes on."""
    from moiety.analysis.controls import evaluate_build
    from moiety.analysis.tables import Table, controls_table, resources_table
    from moiety.compose import Recipe, default_work
    from moiety.compose import build as run

    quiet_libraries()
    read, work, progress = Recipe.read(recipe), work or default_work(out), ConsoleProgress()
    report = run(read, out, work=work, progress=progress)
    values = report.to_dict()
    rows = [
        ("kind", report.kind),
        *((name.replace("_", " "), str(value)) for name, value in report.facts.items()),
        *((f"seconds, {stage}", f"{seconds:.1f}") for stage, seconds in report.seconds.items()),
    ]
    tables = [Table(title=f"composite in {out}", columns=("", ""), rows=tuple(rows))]
    if measure and all(expert.domain.heldout for expert in read.experts):
        values["results"] = results = evaluate_build(read, report.composite, work, progress)
        tables += [controls_table(results), resources_table(results)]
    show(values, tables, as_json)


@app.command(rich_help_panel=PIPELINE)
def route(
    model: Annotated[Path, typer.Argument(help="Folder of a composite.")],
    data: Data,
    init: Annotated[str, typer.Option(help="ridge, centroid or random.")] = "ridge",
    train_steps: Annotated[int, typer.Option(help="Gate-only training steps.", min=0)] = 100,
    windows: Annotated[int, typer.Option(help="Windows a domain.", min=8)] = 128,
    context_length: Context = 512,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder from which stopped training goes on.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Learn a composite's gates from labelled text: closed form, then training."""
    from moiety.analysis.tables import Table
    from moiety.compose import route as run
    from moiety.compose.recipe import Route

    if init not in ("ridge", "centroid", "random"):
        raise InputError(f"init must be ridge, centroid or random, but it is {init!r}")
    quiet_libraries()
    report = run(
        model,
        pairs(data),
        Route(init=init, train_steps=train_steps),
        context_length=context_length,
        windows=windows,
        seed=seed,
        checkpoint=checkpoint,
        progress=ConsoleProgress(),
    )
    rows = [
        (gate.name, f"{gate.mean_accuracy:.3f}", f"{gate.cross_entropy:.3f}")
        for gate in report.fitted.gates
    ]
    note = f"{report.parameters:,} trainable parameters, exactly the gates'"
    if report.training is not None:
        note += (
            f"; held-out loss {report.training.start_loss:.4f} -> {report.training.best_loss:.4f}"
        )
    columns = ("gate", "own-domain accuracy", "cross-entropy")
    title = f"gates of {model}"
    table = Table(title=title, columns=columns, rows=tuple(rows), note=note)
    show(report.to_dict(), [table], as_json)
