"""From a recipe to a composite; what is done stays done."""

from pathlib import Path

from moiety.compose.builder import Builder
from moiety.compose.card import write_card
from moiety.compose.invariants import check_invariants
from moiety.compose.kinds import builder_of
from moiety.compose.plan import COLUMNS, plan
from moiety.compose.preflight import preflight
from moiety.compose.recipe import Recipe
from moiety.compose.report import BuildReport
from moiety.compose.stages import Stages
from moiety.errors import OutputError
from moiety.files import check_new_folder, new_folder, read_json, write_json, write_text
from moiety.progress import SILENT, Progress

RECORD = "build.json"


def build(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    work: str | Path | None = None,
    check: bool = True,
    progress: Progress = SILENT,
) -> BuildReport:
    """Build the composite of a recipe in folder `out`.

    Finished stages are kept in `work` (default: `<out>.stages`), so that an interrupted build
    goes on from the last one and ends with the same files. If `out` already holds this very
    composite nothing is done; if it holds anything else, OutputError. With `check`, what must
    hold of any composite is checked on this one (`moiety.compose.invariants`), which needs it and
    one dense model in memory; nothing is left under `out` if it does not hold.
    """
    recipe = recipe.resolved(Path()) if isinstance(recipe, Recipe) else Recipe.read(recipe)
    out = Path(out).absolute()
    work = default_work(out) if work is None else Path(work)
    check_out(out)
    progress.note("checking the recipe")
    for told in preflight(recipe):
        progress.note(f"note: {told}")
    if progress is not SILENT:
        _announce(recipe, work, progress)
    builder = builder_of(recipe, Stages(work, progress), progress)
    if (out / RECORD).is_file():
        return _finished(out, builder)
    with new_folder(out) as scratch:
        builder.write(scratch)
        invariants = check_invariants(builder, scratch, progress) if check else []
        report = BuildReport(
            builder.key,
            recipe.compose.kind,
            out,
            builder.experts,
            {**builder.facts(), "tensors": builder.tensors()},
            dict(builder.stages.seconds),
            [invariant.to_dict() for invariant in invariants],
        )
        write_card(scratch, recipe, report, invariants=report.invariants)
        write_json(scratch / RECORD, report.to_dict())
        write_text(scratch / "recipe.yaml", recipe.to_yaml())
    return report


def check_out(out: Path) -> None:
    """Raise OutputError where a build cannot write: no new folder, and no composite either."""
    if not (out / RECORD).is_file():
        check_new_folder(out)


def default_work(out: str | Path) -> Path:
    """Where a build keeps its stages unless told otherwise: beside the composite."""
    out = Path(out).absolute()
    return out.with_name(f"{out.name}.stages")


def _announce(recipe: Recipe, work: Path, progress: Progress) -> None:
    """Say what will be done before anything is."""
    rows = [COLUMNS, *plan(recipe, work).rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        progress.note("  ".join([first, *others]).rstrip())
    progress.note("memory and time are estimates")


def _finished(out: Path, builder: Builder) -> BuildReport:
    record = read_json(out / RECORD)
    if record.get("key") != builder.key:
        raise OutputError(
            f"expected {out} to be absent or to hold this recipe's composite, but it holds "
            "another one; choose another output folder or remove it first"
        )
    builder.progress.note(f"{out} already holds this composite")
    return BuildReport(
        **{
            **record,
            "composite": out,
            "experts": {name: Path(path) for name, path in record["experts"].items()},
        }
    )
