"""The command that reports what a trace shows."""

from pathlib import Path
from typing import Annotated

import typer

from moiety.commands.common import READING, Json, app, show
from moiety.console import ConsoleProgress


@app.command(rich_help_panel=READING)
def report(
    trace: Annotated[Path, typer.Argument(help="Folder of a trace.")],
    other: Annotated[
        Path | None, typer.Argument(help="A second trace of the same text, to compare.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write: .html, .md, .json or .csv.")] = Path(
        "report.html"
    ),
    results: Annotated[Path | None, typer.Option(help="results.json with the controls.")] = None,
    counterfactuals: Annotated[
        Path | None, typer.Option(help="Default: counterfactuals.json in the trace's folder.")
    ] = None,
    retention: Annotated[
        Path | None, typer.Option(help="Default: retention.json in the trace's folder.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for every figure as a picture (needs Chromium).")
    ] = None,
    figure_format: Annotated[str, typer.Option(help="svg or png.")] = "svg",
    view_tokens: Annotated[
        int, typer.Option(help="Tokens in the page's token view at most.", min=1)
    ] = 20_000,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Show it here; write no file.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Who handled what, is it real, what did it cost: a page, text or data."""
    from moiety.analysis.report import Reported
    from moiety.analysis.reporting.pictures import write_figures
    from moiety.files import read_json

    made = (
        Reported.compare(trace, other)
        if other is not None
        else Reported.read(
            trace,
            None if results is None else read_json(results),
            counterfactuals=counterfactuals,
            retention=retention,
        )
    )
    progress = ConsoleProgress()
    if not terminal:
        made.write(out, view_tokens)
        progress.note(f"wrote {out}")
    if figures is not None:
        paths = write_figures(list(made.document.figures), figures, figure_format)
        progress.note(f"wrote {len(paths)} figures into {figures}")
    show(made.values, [made] if terminal else [next(made.document.tables)], as_json)
