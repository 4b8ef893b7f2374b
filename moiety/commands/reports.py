"""The command that reports what a trace shows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from moiety.commands.common import READING, Json, app, show
from moiety.console import ConsoleProgress
from moiety.errors import InputError


@app.command(rich_help_panel=READING)
def report(
    trace: Annotated[Path, typer.Argument(help="Folder of a trace.")],
    other: Annotated[
        Path | None, typer.Argument(help="A second trace of the same text, to compare.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write: .html, .md, .json or .csv; default: report.html."),
    ] = None,
    results: Annotated[Path | None, typer.Option(help="results.json with the controls.")] = None,
    counterfactuals: Annotated[
        Path | None, typer.Option(help="Default: counterfactuals.json in the trace's folder.")
    ] = None,
    retention: Annotated[
        Path | None, typer.Option(help="Default: retention.json in the trace's folder.")
    ] = None,
    gate_swap: Annotated[
        Path | None,
        typer.Option(
            help="What compare --data --out wrote, for two traces; default: gate_swap.json in the "
            "first one's folder."
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for every figure as a picture (needs Chromium).")
    ] = None,
    figure_format: Annotated[str, typer.Option(help="svg or png.")] = "svg",
    view_tokens: Annotated[
        int, typer.Option(help="Tokens in the page's token view at most.", min=1)
    ] = 20_000,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Show it here; write a file only with --out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Who handled what, is it real, what did it cost: a page, text or data."""
    from moiety.analysis.report import Reported, check_form
    from moiety.analysis.reporting.pictures import write_figures
    from moiety.files import read_json

    if out is None and not (terminal or as_json):
        out = Path("report.html")
    if out is not None:
        check_form(out)
    of_one = {"results": results, "counterfactuals": counterfactuals, "retention": retention}
    _check_options(other, of_one, gate_swap, figure_format)
    if other is not None:
        made = Reported.compare(trace, other, gate_swap)
    else:
        known = results and read_json(results)
        made = Reported.read(trace, known, counterfactuals=counterfactuals, retention=retention)
    progress = ConsoleProgress()
    if out is not None:
        made.write(out, view_tokens)
        progress.note(f"wrote {out}")
    if figures is not None:
        paths = write_figures(list(made.document.figures), figures, figure_format)
        progress.note(f"wrote {len(paths)} figures into {figures}")
    show(made.values, [made] if terminal else [next(made.document.tables)], as_json)


def _check_options(
    other: Path | None,
    of_one: Mapping[str, Path | None],
    gate_swap: Path | None,
    figure_format: str,
) -> None:
    """Refuse what the report asked for has no place for."""
    if figure_format not in ("svg", "png"):
        raise InputError(f"--figure-format must be svg or png, but it is {figure_format!r}")
    if other is None and gate_swap is not None:
        raise InputError("expected two traces with --gate-swap, but there is one")
    given = [f"--{name}" for name, path in of_one.items() if path is not None]
    if other is not None and given:
        raise InputError(
            f"expected one trace with {', '.join(given)}, but there are two, which are compared; "
            "leave one out"
        )
