"""Commands about one pruned model: recover, inspect, export, rescue, narrow."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moiety.commands.common import EXPERTS, Context, Json, Seed, app, quiet_libraries, show
from moiety.console import ConsoleProgress
from moiety.errors import InputError

Out = Annotated[Path, typer.Option(help="New folder.")]


@app.command(rich_help_panel=EXPERTS)
def recover(
    model: Annotated[str, typer.Argument(help="A packed model.")],
    teacher: Annotated[str, typer.Option(help="The dense finetune it came from.")],
    data: Annotated[str, typer.Option(metavar="FILE", help="Text of its domain.")],
    out: Out,
    method: Annotated[str, typer.Option(help="distill or lora.")] = "distill",
    steps: Annotated[int, typer.Option(help="Training steps at most.", min=1)] = 200,
    windows: Annotated[int, typer.Option(help="Windows of text at most.", min=2)] = 2048,
    context_length: Context = 512,
    seed: Seed = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder from which stopped training goes on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a packed model towards its dense finetune; its masks stay as they are."""
    from moiety.analysis.tables import Table
    from moiety.experts.recovery import METHODS
    from moiety.experts.recovery import recover as run

    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, but it is {method!r}")
    quiet_libraries()
    settings = METHODS[method](
        steps=steps,
        windows=windows,
        context_length=context_length,
        seed=seed,
        checkpoint=checkpoint,
    )
    report = run(model, teacher, data, out, method, settings, ConsoleProgress())
    rows = (
        ("dense finetune", f"{report.loss_teacher:.4f}"),
        ("packed, before", f"{report.loss_before:.4f}"),
        ("packed, after", f"{report.loss_after:.4f}"),
    )
    note = (
        f"{report.held_tokens:,} held-back tokens, context {report.context_length}; "
        f"{report.parameters:,} trained parameters, step {report.best_step} of {report.steps} kept"
    )
    columns = ("model", "loss, nats per token")
    table = Table(title=f"{method} into {out}", columns=columns, rows=rows, note=note)
    show(report.to_dict(), [table], as_json)


@app.command(rich_help_panel=EXPERTS)
def inspect(
    models: Annotated[list[str], typer.Argument(help="Folders or hub ids, dense or packed.")],
    base: Annotated[str | None, typer.Option(help="Base that the others' drift is from.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Sparsity, patterns and bytes; what finetunes changed of their base."""
    from moiety.analysis.tables import Table
    from moiety.experts import inspect as run
    from moiety.experts.inspect import DRIFT_COLUMNS, GROUP_COLUMNS, TENSOR_COLUMNS

    quiet_libraries()
    report = run(models, base, ConsoleProgress())
    tables = []
    for model in report.models:
        groups = tuple(model.group_rows())
        tables.append(Table(title=model.model, columns=GROUP_COLUMNS, rows=groups))
        if tensors:
            rows = tuple(model.tensor_rows())
            tables.append(Table(title=model.model, columns=TENSOR_COLUMNS, rows=rows))
    for model in report.models:
        if drifted := tuple(report.drift_rows(model.model)):
            title = f"{model.model}: drift from {base}"
            tables.append(Table(title=title, columns=DRIFT_COLUMNS, rows=drifted))
    columns, agreements = report.agreement_rows()
    if agreements:
        title = "cosine between task vectors: 1 the same change, 0 unrelated"
        tables.append(Table(title=title, columns=columns, rows=tuple(agreements)))
    show(report.to_dict(), tables, as_json)


@app.command(rich_help_panel=EXPERTS)
def export(
    model: Annotated[str, typer.Argument(help="A packed model or a task vector.")],
    out: Out,
    dense: Annotated[
        bool, typer.Option("--dense", help="As a stock dense checkpoint, for other engines.")
    ] = False,
    expert: Annotated[
        str | None, typer.Option(help="One expert of a routed model, as a dense checkpoint.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; default: as it is.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="A task vector's base, if it moved.")] = None,
    as_json: Json = False,
) -> None:
    """A packed model, composite or task vector as an ordinary dense checkpoint."""
    from moiety.analysis.tables import Table
    from moiety.experts import export_dense, merge_delta
    from moiety.experts.delta import is_task_vector

    if not dense and expert is None:
        raise InputError("expected --dense or --expert NAME: a stock dense checkpoint is exported")
    quiet_libraries()
    if _is_routed(model, expert):
        _export_expert(model, expert, out, dtype or base)
        return
    if is_task_vector(model):
        if dtype is not None:
            raise InputError("expected no --dtype for a task vector; it takes its base's dtypes")
        merge_delta(model, out, base)
        ConsoleProgress().note(f"wrote {out}")
        return
    report = export_dense(model, out, dtype, ConsoleProgress())
    rows = (
        ("matrices unpacked", f"{report.matrices:,}"),
        ("bytes, packed", f"{report.packed_bytes:,}"),
        ("bytes, dense", f"{report.dense_bytes:,}"),
    )
    values: dict[str, Any] = {
        "folder": str(report.folder),
        "matrices": report.matrices,
        "packed_bytes": report.packed_bytes,
        "dense_bytes": report.dense_bytes,
    }
    show(values, [Table(title=f"dense model in {out}", columns=("", ""), rows=rows)], as_json)


def _is_routed(model: str, expert: str | None) -> bool:
    from moiety.compose.exporting import layout_of
    from moiety.experts.checkpoint import Checkpoint

    layout = layout_of(Checkpoint(model))
    if expert is None and layout is not None:
        raise InputError(
            f"expected a model with a stock layout, but {model} routes its linears, which none "
            f"has; export one expert with --expert NAME ({', '.join(layout.experts)})"
        )
    return expert is not None


def _export_expert(model: str, expert: str | None, out: Path, foreign: str | None) -> None:
    from moiety.compose.exporting import export_expert

    assert expert is not None
    if foreign is not None:
        raise InputError("expected no --dtype or --base with --expert; it keeps its dtypes")
    export_expert(model, expert, out, ConsoleProgress())
    ConsoleProgress().note(f"wrote {out}")


@app.command(rich_help_panel=EXPERTS)
def rescue(
    model: Annotated[str, typer.Argument(help="An old sparse-24-bitmask or sparse-bitmask model.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Open an old compressed-tensors sparse checkpoint, checked, as a packed model."""
    from dataclasses import asdict

    from moiety.analysis.tables import Table
    from moiety.experts import rescue as run

    quiet_libraries()
    report = run(model, out, ConsoleProgress())
    values = asdict(report)
    rows = tuple((name.replace("_", " "), _plain(value)) for name, value in values.items())
    show(values, [Table(title=f"packed model in {out}", columns=("", ""), rows=rows)], as_json)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_plain(one)}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


@app.command(rich_help_panel=EXPERTS)
def narrow(
    model: Annotated[str, typer.Argument(help="A dense model: folder or hub id.")],
    out: Out,
    data: Annotated[str, typer.Option(metavar="FILE", help="Text of its domain.")],
    keep: Annotated[float, typer.Option(help="Share of the FFN neurons to keep.")] = 0.75,
    multiple: Annotated[int, typer.Option(help="Round to a multiple of this.", min=1)] = 8,
    refit: Annotated[bool, typer.Option(help="Fit the last FFN matrix again.")] = True,
    windows: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    context_length: Context = 512,
    as_json: Json = False,
) -> None:
    """Fewer FFN neurons: a smaller dense model of the stock kind."""
    from moiety.analysis.tables import Table
    from moiety.experts import WidthSettings, prune_width

    quiet_libraries()
    settings = WidthSettings(
        keep=keep, multiple=multiple, refit=refit, windows=windows, context_length=context_length
    )
    report = prune_width(model, out, data, settings, ConsoleProgress())
    rows = tuple(
        (str(number), f"{block.error_cut:.2e}", f"{block.error_after:.2e}")
        for number, block in enumerate(report.blocks)
    )
    note = (
        f"{report.config_field} {report.width_before:,} -> {report.width_after:,}; parameters "
        f"{report.parameters_before:,} -> {report.parameters_after:,}; {report.seconds:.1f} s"
    )
    columns = ("block", "error of the FFN, cut", "as written")
    table = Table(title=f"smaller dense model in {out}", columns=columns, rows=rows, note=note)
    show(report.to_dict(), [table], as_json)
