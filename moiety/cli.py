"""The command line: parses, calls the Python functions of the same names, prints what came.

Heavy imports happen inside the commands, so that `moiety --help` answers at once.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from moiety.console import ConsoleProgress, results_console, show_error
from moiety.errors import InputError, OutputError
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

INTERRUPTED = 130
PIPELINE, READING, START = "Pipeline", "Reading a composite", "Start here"
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

    _quiet_libraries()
    results, shown = run(
        out, quick=quick, fresh=fresh, cache=cache, seed=seed, progress=ConsoleProgress()
    )
    _print(results, shown, as_json)
    if not as_json:
        ConsoleProgress().note(f"everything is in {out}; open {out / 'report.html'} in a browser")


@app.command(rich_help_panel=PIPELINE)
def prune(
    model: Annotated[str, typer.Argument(help="Finetune: a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="New folder for the packed model.")],
    data: Annotated[Path, typer.Option(help="Calibration text of the finetune's domain.")],
    pattern: Annotated[str, typer.Option(help="Kept:group, e.g. 2:4 or 4:8.")] = "2:4",
    sites: Annotated[str, typer.Option(help="ffn, attention or all.")] = "all",
    method: Annotated[str, typer.Option(help="sparsegpt, wanda or magnitude.")] = "sparsegpt",
    refit_steps: Annotated[int, typer.Option(help="Refit steps; 0 for none.", min=0)] = 20,
    values: Annotated[str, typer.Option(help="Stored as bf16, fp16 or fp32.")] = "bf16",
    windows: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    context_length: Context = 512,
    as_json: Json = False,
) -> None:
    """One finetune to one packed sparse model."""
    from moiety.analysis.tables import Table
    from moiety.experts import PruneSettings
    from moiety.experts import prune as run

    settings = PruneSettings(
        pattern=pattern,
        sites=sites,
        method=method,
        refit_steps=refit_steps,
        values=values,
        windows=windows,
        context_length=context_length,
    )
    _quiet_libraries()
    report = run(model, out, data, settings, ConsoleProgress())
    rows = [
        (
            matrix.name,
            "x".join(str(size) for size in matrix.shape),
            f"{matrix.error_after_method:.2e}",
            f"{matrix.error_after_refit:.2e}",
        )
        for matrix in report.matrices
    ]
    saved = f"{report.packed_bytes:,} of {report.dense_bytes:,} bytes, {report.seconds:.1f} s"
    columns = ("matrix", "shape", f"error after {method}", "after refit and rounding")
    title = f"{out}: {pattern} on {sites}"
    table = Table(title=title, columns=columns, rows=tuple(rows), note=saved)
    _print(report.to_dict(), [table], as_json)


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

    _quiet_libraries()
    read, work, progress = Recipe.read(recipe), work or default_work(out), ConsoleProgress()
    report = run(read, out, work=work, progress=progress)
    values = report.to_dict()
    rows = [
        ("shared part from", report.shared),
        ("trainable parameters (the gates)", f"{report.gate_parameters:,}"),
        *((f"seconds, {stage}", f"{seconds:.1f}") for stage, seconds in report.seconds.items()),
    ]
    tables = [Table(title=f"composite in {out}", columns=("", ""), rows=tuple(rows))]
    if measure and all(expert.domain.heldout for expert in read.experts):
        values["results"] = results = evaluate_build(read, report.composite, work, progress)
        tables += [controls_table(results), resources_table(results)]
    _print(values, tables, as_json)


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
    _quiet_libraries()
    report = run(
        model,
        _pairs(data),
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
    _print(report.to_dict(), [table], as_json)


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

    _quiet_libraries()
    results = run(
        model,
        _pairs(data),
        context_length=context_length,
        windows=windows,
        seed=seed,
        progress=ConsoleProgress(),
    )
    tables = [controls_table(results), controls_table(results, "bits_per_byte")]
    _print(results, [*tables, resources_table(results)], as_json)


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

    _quiet_libraries()
    folder = run(
        model,
        _pairs(data),
        out,
        context_length=context_length,
        windows=windows,
        progress=ConsoleProgress(),
    )
    summary = summarise(Trace.open(folder))
    _print(summary.to_dict(), [routing_table(summary)], as_json)


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
    _print(summary.to_dict(), [routing_table(summary)], as_json)
    ConsoleProgress().note(f"wrote {out}")


def _pairs(data: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in data:
        name, found, path = text.partition("=")
        if not found or not name or not path:
            raise InputError(f"--data must look like NAME=FILE, but it is {text!r}")
        if name in pairs:
            raise InputError(f"--data names {name} twice; give each domain one file or folder")
        pairs[name] = path
    return pairs


def _print(values: Any, shown: list[Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, default=str, indent=2))
        return
    console = results_console()
    for item in shown:
        console.print(item.to_rich() if hasattr(item, "to_rich") else item)


def _quiet_libraries() -> None:
    """Our own progress is shown instead of the libraries' bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main() -> NoReturn:
    """Run the command line.

    Exit codes: 0 all went well, 1 a fault of ours, 2 input to mend, 130 interrupted.
    """
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, prog_name="moiety")
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            show_error("interrupted; the same command started again goes on where it can")
        raise
    except Exception as error:
        known = isinstance(error, InputError | OutputError)
        if debug:
            traceback.print_exc()
        elif known:
            show_error(str(error))
        else:
            show_error(f"{type(error).__name__}: {error} (run again with --debug to see where)")
        sys.exit(2 if known else 1)
    sys.exit(0)
