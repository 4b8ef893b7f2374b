"""The command to start with."""

from pathlib import Path
from typing import Annotated

import typer

from moiety.commands.common import START, Json, Seed, app, quiet_libraries, show
from moiety.console import ConsoleProgress


@app.command(rich_help_panel=START)
def demo(
    out: Annotated[Path, typer.Option(help="New folder for everything.")] = Path("moiety-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller models, same path.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train the models again.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where trained models are kept.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The whole pipeline on text that every machine has: prune, compose, route, explain."""
    from moiety.demo.run import run

    quiet_libraries()
    results, shown = run(
        out, quick=quick, fresh=fresh, cache=cache, seed=seed, progress=ConsoleProgress()
    )
    show(results, shown, as_json)
    if not as_json:
        ConsoleProgress().note(f"everything is in {out}; open {out / 'report.html'} in a browser")
