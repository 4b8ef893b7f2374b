"""Commands that read a composite: eval, trace."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moiety.commands.common import (
    READING,
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

OptionalData = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="NAME=FILE", help="A domain's text; repeat for each domain."),
]


@app.command("eval", rich_help_panel=READING)
def evaluate(
    model: Annotated[str, typer.Argument(help="A composite or any other language model.")],
    data: OptionalData = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="lm-eval tasks, with or without --data.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with lm-eval task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents a task at most.", min=1)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in a task's prompt; default: the task's.", min=0)
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Let lm-eval fetch the tasks' data.")
    ] = False,
    windows: Annotated[int, typer.Option(help="Held-out windows a domain.", min=1)] = 64,
    context_length: Context = 512,
    batch_size: Annotated[int, typer.Option(help="Texts at a time.", min=1)] = 8,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Loss by domain with the router's controls, lm-eval tasks, bytes and speed."""
    from moiety.analysis.evaluate import evaluate as run
    from moiety.analysis.harness import Tasks, TaskSettings, tasks_table
    from moiety.analysis.tables import controls_table, resources_table
    from moiety.compose.opening import open_any

    if not data and tasks is None:
        raise InputError("expected --data NAME=FILE, --tasks A,B or both, but got neither")
    texts, progress = pairs(data or []), ConsoleProgress()
    quiet_libraries()
    found = None if tasks is None else Tasks(tasks.split(","), include_path, progress)
    opened = model if found is None else open_any(model)
    results, tables = {}, []
    if texts:
        results = run(
            opened,
            texts,
            context_length=context_length,
            windows=windows,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
        tables = [controls_table(results), controls_table(results, "bits_per_byte")]
        tables.append(resources_table(results))
    if found is not None and not isinstance(opened, str):
        settings = TaskSettings(limit, num_fewshot, batch_size, online)
        scores = found.run(opened, settings, progress)
        results["lm_eval"] = [asdict(score) for score in scores]
        tables.append(tasks_table(scores))
    show(results, tables, as_json)


@app.command(rich_help_panel=READING)
def trace(
    model: Annotated[str, typer.Argument(help="A composite or any transformers MoE.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for the trace.")],
    windows: Annotated[int, typer.Option(help="Windows a domain.", min=1)] = 64,
    context_length: Context = 512,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.", min=1)] = 8,
    new_tokens: Annotated[
        int, typer.Option(help="Also write so many tokens after each window, and trace them.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Record which experts every token of labelled text went to."""
    from moiety.analysis import Trace, summarise
    from moiety.analysis import trace as run
    from moiety.analysis.tables import routing_table

    quiet_libraries()
    folder = run(
        model,
        pairs(data),
        out,
        context_length=context_length,
        windows=windows,
        batch_size=batch_size,
        new_tokens=new_tokens,
        progress=ConsoleProgress(),
    )
    summary = summarise(Trace.open(folder))
    show(summary.to_dict(), [routing_table(summary)], as_json)
