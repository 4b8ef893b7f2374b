"""Commands that read a composite: eval, trace, report."""

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


@app.command("eval", rich_help_panel=READING)
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a composite.")],
    data: Data,
    windows: Annotated[int, typer.Option(help="Held-out windows a domain.", min=1)] = 64,
    context_length: Context = 512,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Loss by domain under the learned router and its controls, bytes and speed."""
    from moiety.analysis.evaluate import evaluate as run
    from moiety.analysis.tables import controls_table, resources_table

    quiet_libraries()
    results = run(
        model,
        pairs(data),
        context_length=context_length,
        windows=windows,
        seed=seed,
        progress=ConsoleProgress(),
    )
    tables = [controls_table(results), controls_table(results, "bits_per_byte")]
    show(results, [*tables, resources_table(results)], as_json)


@app.command(rich_help_panel=READING)
def trace(
    model: Annotated[str, typer.Argument(help="A composite or any transformers MoE.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for the trace.")],
    windows: Annotated[int, typer.Option(help="Windows a domain.", min=1)] = 64,
    context_length: Context = 512,
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
        progress=ConsoleProgress(),
    )
    summary = summarise(Trace.open(folder))
    show(summary.to_dict(), [routing_table(summary)], as_json)


@app.command(rich_help_panel=READING)
def report(
    trace: Annotated[Path, typer.Argument(help="Folder of a trace.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    results: Annotated[Path | None, typer.Option(help="results.json with the controls.")] = None,
    as_json: Json = False,
) -> None:
    """A self-contained HTML page: who handled what, is it real, what did it cost."""
    from moiety.analysis import Trace, summarise
    from moiety.analysis import report as run
    from moiety.analysis.tables import routing_table
    from moiety.files import read_json

    run(trace, out, None if results is None else read_json(results))
    summary = summarise(Trace.open(trace))
    show(summary.to_dict(), [routing_table(summary)], as_json)
    ConsoleProgress().note(f"wrote {out}")
