"""The command that learns routers: route."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

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

if TYPE_CHECKING:
    from moiety.analysis.tables import Table
    from moiety.compose import RouteReport
    from moiety.compose.composite import Spread
    from moiety.compose.recipe import Route


@app.command(rich_help_panel=PIPELINE)
def route(
    model: Annotated[Path, typer.Argument(help="Folder of a composite.")],
    data: Data,
    init: Annotated[
        str, typer.Option(help="logistic, ridge, centroid, arrow, prompts, random or zeros.")
    ] = "logistic",
    stitch: Annotated[
        float, typer.Option(help="Windows that switch domain, for each of a domain's own.", min=0)
    ] = 0.5,
    train_steps: Annotated[int, typer.Option(help="Gate-only training steps.", min=0)] = 100,
    objective: Annotated[
        str, typer.Option(help="language, distill, domain or regret.")
    ] = "language",
    balance: Annotated[str, typer.Option(help="loss, bias or none.")] = "loss",
    windows: Annotated[int, typer.Option(help="Windows a domain.", min=8)] = 128,
    context_length: Context = 512,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder from which stopped training goes on.")
    ] = None,
    tracker: Annotated[
        list[str] | None, typer.Option(help="Log training to tensorboard, trackio...; repeat.")
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Where trackers write.")] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what gates saw, so that an added domain is read alone."
        ),
    ] = None,
    spread: Annotated[
        str, typer.Option(help="Under torchrun, what processes share out: weights or experts.")
    ] = "none",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Learn a composite's gates from labelled text: closed form, then training."""
    from moiety.compose import route as run
    from moiety.routers.together import is_first

    settings = _settings(
        init=init, stitch=stitch, train_steps=train_steps, objective=objective, balance=balance
    )
    quiet_libraries()
    report = run(
        model,
        pairs(data),
        settings,
        context_length=context_length,
        windows=windows,
        seed=seed,
        checkpoint=checkpoint,
        trackers=tracker or (),
        log_dir=log_dir,
        statistics=statistics,
        spread=_spread(spread),
        progress=ConsoleProgress(),
    )
    if is_first():
        show(report.to_dict(), [_table(report, model)], as_json)


def _spread(given: str) -> "Spread":
    from moiety.compose.composite import Spread

    if given not in get_args(Spread):
        raise InputError(
            f"--spread must be one of {', '.join(get_args(Spread))}, but it is {given!r}"
        )
    return cast("Spread", given)


def _settings(**given: Any) -> "Route":
    from pydantic import ValidationError

    from moiety.compose.recipe import Route

    try:
        return Route(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise InputError(
            f"--{name}: {first['msg'].lower()}, but it is {first['input']!r}"
        ) from error


def _table(report: "RouteReport", model: Path) -> "Table":
    from moiety.analysis.tables import Table

    fitted, training = report.fitted, report.training
    rows = [
        (gate.name, f"{gate.mean_accuracy:.3f}", f"{gate.cross_entropy:.3f}")
        for gate in (fitted.gates if fitted else ())
    ]
    note = f"{report.parameters:,} trainable parameters, exactly the gates'"
    if fitted:
        note += f"; fitted in {fitted.seconds:.1f} s"
    else:
        note = "Routers of this kind learn nothing."
    if training is not None:
        note += (
            f"; regret on held-back text {training.start_regret:.4f} -> {training.best_regret:.4f}"
        )
    columns = ("gate", "own-domain accuracy", "cross-entropy")
    return Table(title=f"gates of {model}", columns=columns, rows=tuple(rows), note=note)
