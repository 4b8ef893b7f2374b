"""What the commands share: the app, options that mean the same everywhere, printing."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from moiety.console import results_console
from moiety.errors import InputError
from moiety.version import __version__

app = typer.Typer(
    name="moiety",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Several domain finetunes of one base model as one sparse, routed model.",
)

START, EXPERTS, PIPELINE = "Start here", "One expert", "Many experts into one model"
READING = "Reading a composite"
Data = Annotated[
    list[str],
    typer.Option("--data", metavar="NAME=FILE", help="A domain's text; repeat for each domain."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines, not a table.")]
Context = Annotated[int, typer.Option(help="Tokens in a window of text.", min=16)]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", min=0)]


def _version(value: bool) -> None:
    if value:
        Console().print(f"moiety {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Prune, compose, route, analyse."""


def pairs(data: list[str], what: str = "--data") -> dict[str, str]:
    """`NAME=FILE` options as a mapping; InputError for another form or a name given twice."""
    found_pairs: dict[str, str] = {}
    for text in data:
        name, found, path = text.partition("=")
        if not found or not name or not path:
            raise InputError(f"{what} must look like NAME=FILE, but it is {text!r}")
        if name in found_pairs:
            raise InputError(f"{what} names {name} twice; give each name one file or folder")
        found_pairs[name] = path
    return found_pairs


def show(values: Any, shown: list[Any], as_json: bool) -> None:
    """Print values as JSON, or tables for people."""
    if as_json:
        typer.echo(json.dumps(values, default=str, indent=2))
        return
    console = results_console()
    for item in shown:
        console.print(item.to_rich() if hasattr(item, "to_rich") else item)


def quiet_libraries() -> None:
    """Our own progress is shown instead of the libraries' bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
