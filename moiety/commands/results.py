"""Commands that test what a composite does: analyse, counterfactuals, compare, retention."""

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
from moiety.errors import InputError, OutputError
from moiety.files import check_writable

Out = Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")]
Windows = Annotated[int, typer.Option(help="Windows a domain.", min=1)]
Batch = Annotated[int, typer.Option(help="Windows at a time.", min=1)]


@app.command(rich_help_panel=READING)
def analyse(
    trace: Annotated[Path, typer.Argument(help="Folder of a trace.")],
    out: Out = None,
    counted: Annotated[
        str, typer.Option(help="first: a token's first expert; chosen: all its experts.")
    ] = "first",
    permutations: Annotated[int, typer.Option(help="Relabellings of documents.", min=1)] = 999,
    phase: Annotated[
        str | None, typer.Option(help="prefill or decode; both when not given.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Statistics of a trace: who is routed where, and is it more than chance."""
    from moiety.analysis import Trace, summarise
    from moiety.analysis.results import write_result
    from moiety.analysis.tables import layer_table, routing_table

    if counted not in ("first", "chosen"):
        raise InputError(f"--counted must be first or chosen, but it is {counted!r}")
    _check_out(out)
    opened = Trace.open(trace)
    if phase is not None:
        opened = opened.phase(phase)
    summary = summarise(opened, counted=counted, permutations=permutations, seed=seed)
    if out is not None:
        write_result(out, summary)
    show(summary.to_dict(), [routing_table(summary), layer_table(summary)], as_json)


@app.command(rich_help_panel=READING)
def counterfactuals(
    model: Annotated[str, typer.Argument(help="A composite or any transformers MoE.")],
    data: Data,
    out: Out = None,
    experts: Annotated[
        str | None, typer.Option(metavar="0,1,...", help="Experts to intervene on; default: all.")
    ] = None,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Also remove each expert in one layer at a time.")
    ] = False,
    tokens: Annotated[
        int, typer.Option(help="Tokens a domain sent to every expert by themselves.", min=0)
    ] = 16,
    windows: Windows = 32,
    context_length: Context = 512,
    batch_size: Batch = 8,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What a wrong route costs: experts forced, removed, left out and swapped."""
    from moiety.analysis import counterfactuals as run
    from moiety.analysis.counterfactuals import Settings
    from moiety.analysis.results import to_dict, write_result
    from moiety.analysis.results_tables import counterfactual_tables

    _check_out(out)
    quiet_libraries()
    settings = Settings(
        experts=None if experts is None else _numbers(experts),
        by_layer=by_layer,
        tokens=tokens,
        batch_size=batch_size,
        seed=seed,
    )
    result = run(
        model,
        pairs(data),
        settings,
        context_length=context_length,
        windows=windows,
        progress=ConsoleProgress(),
    )
    if out is not None:
        write_result(out, result)
    show(to_dict(result), counterfactual_tables(result), as_json)


@app.command(rich_help_panel=READING)
def compare(
    first: Annotated[str, typer.Argument(help="Folder of a trace, or with --data a model.")],
    second: Annotated[str, typer.Argument(help="Another of the same text.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="NAME=FILE", help="Swap the gates of two models on this text."
        ),
    ] = None,
    out: Out = None,
    windows: Windows = 32,
    context_length: Context = 512,
    batch_size: Batch = 8,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Two checkpoints or routers on the same text: overlap, drift, gates swapped."""
    from moiety.analysis import Trace, gate_swap
    from moiety.analysis import compare as run
    from moiety.analysis.results import to_dict, write_result
    from moiety.analysis.results_tables import comparison_tables, gate_swap_table

    _check_out(out)
    quiet_libraries()
    if data:
        result = gate_swap(
            first,
            second,
            pairs(data),
            context_length=context_length,
            windows=windows,
            batch_size=batch_size,
        )
        shown = [gate_swap_table(result)]
    else:
        result = run(Trace.open(first), Trace.open(second), seed=seed)
        shown = comparison_tables(result)
    if out is not None:
        write_result(out, result)
    show(to_dict(result), shown, as_json)


@app.command(rich_help_panel=READING)
def retention(
    recipe: Annotated[Path, typer.Argument(help="Recipe file; every domain needs heldout text.")],
    composite: Annotated[
        Path | None, typer.Option(help="Folder of the composite built from it.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the build's stages; default: COMPOSITE.stages.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Losses of dense and sparse experts on every domain: home and away."""
    from moiety.analysis import retention as run
    from moiety.analysis.results import to_dict, write_result
    from moiety.analysis.results_tables import retention_tables
    from moiety.compose import Recipe

    if composite is None and work is None:
        raise InputError("expected --composite DIR, --work DIR or both, but got neither")
    if work is None:
        assert composite is not None
        work = composite.with_name(f"{composite.name}.stages")
    _check_out(out)
    quiet_libraries()
    result = run(Recipe.read(recipe), composite, work, ConsoleProgress())
    if out is not None:
        write_result(out, result)
    show(to_dict(result), retention_tables(result), as_json)


def _check_out(out: Path | None) -> None:
    """Refuse a place where the result could not be written, before there is one."""
    if out is None:
        return
    if out.is_dir():
        raise OutputError(f"expected {out} to be a file to write, but it is a folder; add a name")
    check_writable(out.parent)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise InputError(f"--experts must look like 0,1,2, but it is {text!r}")
    return tuple(int(part) for part in parts)
