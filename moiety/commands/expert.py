"""The command that prunes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moiety.commands.common import EXPERTS, Context, Json, app, pairs, quiet_libraries, show
from moiety.console import ConsoleProgress
from moiety.errors import InputError

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL | NAME=MODEL...",
        help="A finetune (folder, hub id or PEFT adapter), or several, each with a name.",
    ),
]
Texts = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="FILE | NAME=FILE",
        help="Calibration text of the finetune's domain: file, folder or datasets:ID.",
    ),
]
Out = Annotated[Path, typer.Option(help="New folder for the packed model (or models).")]
PATTERN = "Kept:group as in 2:4 or 4:8, or the share kept, as in 0.5."
SITES = "all, ffn, attention, or globs such as '*.down_proj,*.o_proj'."
METHOD = "sparsegpt, alps, wanda, ria or magnitude."
RECOVER = "Then train the kept values block by block."
VALUES = "Kept values as bf16, fp16, fp32, int8 or int4."
BASE = "Prune the difference to this base, which stays dense."
MASKS = "Take over the masks of this packed model."
SHARED = "One mask for all finetunes, chosen on this base."
ALLOCATION = "uniform, or owl: each block its own density."
DEVICE = "Where it is done: cpu, cuda or cuda:1."
SCHEDULE = "Patterns to go through before, as in 0.8,0.65."


@app.command(rich_help_panel=EXPERTS)
def prune(
    models: Models,
    out: Out,
    data: Texts,
    pattern: Annotated[str, typer.Option(help=PATTERN)] = "2:4",
    sites: Annotated[str, typer.Option(help=SITES)] = "all",
    method: Annotated[str, typer.Option(help=METHOD)] = "sparsegpt",
    best: Annotated[bool, typer.Option("--best", help="The same as --method alps.")] = False,
    refit_steps: Annotated[int | None, typer.Option(help="Refit steps; 0: none.", min=0)] = None,
    recover: Annotated[bool, typer.Option("--recover", help=RECOVER)] = False,
    values: Annotated[str, typer.Option(help=VALUES)] = "bf16",
    base: Annotated[str | None, typer.Option(help=BASE)] = None,
    masks: Annotated[str | None, typer.Option(help=MASKS)] = None,
    shared_mask: Annotated[str | None, typer.Option(metavar="BASE", help=SHARED)] = None,
    allocation: Annotated[str, typer.Option(help=ALLOCATION)] = "uniform",
    schedule: Annotated[str, typer.Option(help=SCHEDULE)] = "",
    windows: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    context_length: Context = 512,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.", min=1)] = 8,
    device: Annotated[str, typer.Option(help=DEVICE)] = "cpu",
    as_json: Json = False,
) -> None:
    """A finetune, or several, to packed sparse models; goes on where it was interrupted."""
    from moiety.experts import BlockRecovery, PruneSettings

    if best and method not in ("sparsegpt", "alps"):
        raise InputError(f"expected --best or --method {method}, not both; leave one of them out")
    settings: dict[str, Any] = {
        "pattern": pattern,
        "sites": sites,
        "method": "alps" if best else method,
        "recovery": BlockRecovery() if recover else None,
        "values": values,
        "allocation": allocation,
        "schedule": tuple(part.strip() for part in schedule.split(",") if part.strip()),
        "windows": windows,
        "context_length": context_length,
        "batch_size": batch_size,
        "device": device,
    }
    if refit_steps is not None:
        settings["refit_steps"] = refit_steps
    quiet_libraries()
    sources = {"base": base, "masks": masks, "shared_mask": shared_mask}
    _prune(models, out, data, PruneSettings(**settings), sources, as_json)


def _prune(
    models: Sequence[str],
    out: Path,
    data: Sequence[str],
    settings: Any,
    sources: Mapping[str, str | None],
    as_json: bool,
) -> None:
    from accelerate import PartialState

    from moiety.analysis.pruning import pruning_table
    from moiety.experts import Finetune, prune_many
    from moiety.experts import prune as prune_one

    progress = ConsoleProgress()
    if len(models) == 1 and not _is_named(models[0]):
        if sources["shared_mask"] is not None or len(data) != 1:
            raise InputError(
                "expected NAME=MODEL for each finetune to prune with a shared mask or several "
                f"texts, but it is {models[0]!r}"
            )
        base, masks = sources["base"], sources["masks"]
        report = prune_one(models[0], out, data[0], settings, progress, base=base, masks=masks)
        show(report.to_dict(), [pruning_table(str(out), report)], as_json)
        return
    unnamed = next((model for model in models if not _is_named(model)), None)
    if unnamed is not None:
        raise InputError(
            f"expected NAME=MODEL for each of several finetunes, but one is {unnamed!r}; "
            "give each a name, and its text as --data NAME=FILE"
        )
    named, texts = pairs(list(models), "MODEL"), pairs(list(data))
    if named.keys() != texts.keys():
        raise InputError(f"expected --data for {', '.join(named)}, but it names {', '.join(texts)}")
    finetunes = [Finetune(name=name, model=named[name], data=texts[name]) for name in named]
    reports = prune_many(finetunes, out, settings, progress, **sources)
    if not PartialState().is_main_process:
        return
    values = {name: report.to_dict() for name, report in reports.items()}
    tables = [pruning_table(str(out / name), report) for name, report in reports.items()]
    show(values, tables, as_json)


def _is_named(model: str) -> bool:
    return "=" in model and not Path(model).exists()
