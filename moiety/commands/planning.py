"""The command that says whether a model fits."""

from typing import Annotated

import typer

from moiety.commands.common import READING, Json, app, quiet_libraries, show


@app.command(rich_help_panel=READING)
def plan(
    model: Annotated[
        str, typer.Argument(metavar="RECIPE|MODEL", help="Recipe, folder, config.json or hub id.")
    ],
    gpu: Annotated[
        str | None, typer.Option(help="Memory as 16GB or 16GiB, or a card as rtx4090.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of each sequence.", min=1)] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at a time.", min=1)] = 1,
    bandwidth: Annotated[
        str | None, typer.Option(help="Of the card, as 672GB/s; known cards have theirs.")
    ] = None,
    cache: Annotated[str, typer.Option(help="KV cache in bf16, fp32, fp8, int8 or int4.")] = "bf16",
    chunk: Annotated[int, typer.Option(help="Prompt tokens processed at once.", min=1)] = 2048,
    overhead: Annotated[str, typer.Option(help="Taken before any model.")] = "0.75GB",
    as_json: Json = False,
) -> None:
    """Does it fit, with how long a context and how many experts, how fast at most?"""
    from moiety.analysis.planner import plan as run
    from moiety.analysis.planner.tables import plan_tables

    quiet_libraries()
    made = run(
        model,
        gpu=gpu,
        bandwidth=bandwidth,
        context=context,
        batch=batch,
        cache=cache,
        chunk=chunk,
        overhead=overhead,
    )
    show(made.to_dict(), plan_tables(made), as_json)
