"""What a build will do, read and write, before it does: its stages and what is done already."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moiety.compose.builder import Builder
from moiety.compose.costs import (
    ATTAINED,
    Sizes,
    Work,
    composite_bytes,
    measured_speed,
    sizes_of,
)
from moiety.compose.kinds import BUILDERS
from moiety.compose.recipe import Merge, Mixture, Recipe, Routed
from moiety.compose.shared import WEIGHTS
from moiety.compose.stages import RECORD, Stages
from moiety.errors import InputError
from moiety.experts.checkpoint import ADAPTER, Checkpoint, digest_of_model, local_folder
from moiety.experts.packing import LARGEST_CODE
from moiety.files import digest
from moiety.units import size

PACKED_FIRST = ("shared_mask", "conflict_aware")
"""Ways of a sparse merge whose masks are known before the merge is made."""
COLUMNS = ("stage", "state", "reads", "writes", "memory", "time")


@dataclass(frozen=True)
class PlannedStage:
    """One stage: whether it is done, the bytes it reads and writes, and estimates of the rest."""

    name: str
    done: bool
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The stages of a build in order. Memory and time are estimates; `speed` was measured.

    `composite_bytes` are those of its weights (and of a base it needs beside it), `dense_bytes`
    those of all the finetunes' weights, `speed` is in operations a second.
    """

    kind: str
    work: Path
    stages: tuple[PlannedStage, ...]
    composite_bytes: int
    dense_bytes: int
    speed: float

    @property
    def left(self) -> tuple[PlannedStage, ...]:
        """The stages that are still to be run."""
        return tuple(stage for stage in self.stages if not stage.done)

    @property
    def peak_bytes(self) -> int:
        """Estimated memory of the largest stage that is left."""
        return max((stage.peak_bytes for stage in self.left), default=0)

    @property
    def seconds(self) -> float:
        """Estimated time of what is left."""
        return sum(stage.seconds for stage in self.left)

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        return {
            **vars(self),
            "work": str(self.work),
            "stages": [asdict(stage) for stage in self.stages],
            "estimated_peak_bytes": self.peak_bytes,
            "estimated_seconds": self.seconds,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of a table with COLUMNS, the last row the total of what is left."""
        cells = [
            (
                stage.name,
                "done" if stage.done else "to do",
                size(stage.read_bytes),
                size(stage.written_bytes),
                size(stage.peak_bytes),
                _duration(stage.seconds),
            )
            for stage in self.stages
        ]
        totals = [sum(getattr(s, f) for s in self.left) for f in ("read_bytes", "written_bytes")]
        total = (
            "all that is left",
            f"{len(self.left)} of {len(self.stages)}",
            *map(size, totals),
            size(self.peak_bytes),
            _duration(self.seconds),
        )
        return [*cells, total]


def plan(recipe: Recipe, work: str | Path) -> Plan:
    """What building a recipe with its stages in `work` will do; nothing is written.

    Bytes follow from shapes, pattern and values. Memory and time are estimates from a simple
    cost model and a matrix product measured for a tenth of a second. A recipe that cannot be
    built is best refused by `preflight` first: InputError when its models cannot be read.
    """
    work, base = Path(work), Checkpoint(recipe.base)
    sizes, speed = sizes_of(recipe, base), measured_speed()
    total = composite_bytes(recipe, sizes)
    done = finished_stages(recipe, work)
    stages = tuple(
        PlannedStage(name, name in done, read, written, memory, operations / (ATTAINED * speed))
        for name, read, written, memory, operations in _costs(recipe, sizes, total)
    )
    dense = sizes.dense * len(recipe.experts)
    return Plan(recipe.compose.kind, work, stages, total, dense, speed)


Cost = tuple[str, int, int, int, float]
"""Name of a stage, bytes read and written, bytes of memory, operations."""


def _costs(recipe: Recipe, sizes: Sizes, total: int) -> Iterator[Cost]:
    work, kind, count = Work(recipe, sizes), recipe.compose, len(recipe.experts)
    if recipe.tokenizer == "union":
        models = count + 1
        yield "union", sizes.dense * models**2, sizes.dense * models, sizes.block_fp32, 0.0
    if isinstance(kind, Merge):
        yield from _merge_costs(recipe, kind, work, total)
    else:
        delta = isinstance(kind, Routed) and kind.base == "dense"
        written = sizes.matrices_packed if delta else sizes.expert
        for name in recipe.names:
            yield f"expert-{name}", sizes.dense * (1 + delta), written, work.pruning, work.prune
    if isinstance(kind, Mixture | Routed):
        read = total + sizes.dense * (count + 1)
        yield "shared", read, sizes.rest, total + 2 * sizes.rest, work.shared
        yield "route", total, 0, total + work.activations, work.route
    beside = isinstance(kind, Merge) and kind.sparse == "conflict_aware"
    written = total - beside * sizes.dense
    yield "composite", written, written, written // 4, 0.0
    if all(expert.domain.heldout for expert in recipe.experts):
        read = total + sizes.dense * (2 + count)
        yield "evaluate", read, 0, 2 * sizes.dense + total, work.evaluate


def _merge_costs(recipe: Recipe, kind: Merge, work: Work, total: int) -> Iterator[Cost]:
    sizes, count = work.sizes, len(recipe.experts)
    everything = sizes.dense * (count + 1)
    if kind.sparse == "shared_mask":
        yield "shared-mask", sizes.dense, sizes.expert, work.pruning, work.prune * count
        for name in recipe.names:
            yield f"masked-{name}", sizes.dense, sizes.expert, work.pruning, work.prune
    if kind.sparse == "conflict_aware" and recipe.prune.method != "magnitude":
        for name in recipe.names:
            yield f"norms-{name}", sizes.dense, 0, work.pruning, work.forward(work.tokens)
    if kind.chooses_weight:
        yield "weight", everything * len(WEIGHTS), 0, 2 * sizes.dense, work.weigh
    written = total - sizes.dense if kind.sparse == "conflict_aware" else total
    memory = sizes.block_fp32 * (count + 1)
    if _dense_first(recipe, kind):
        yield "dense-merge", everything, sizes.dense, memory, 0.0
    if kind.sparse in PACKED_FIRST:
        yield "packed-merge", everything, written, memory, 0.0
    if kind.sparse == "reprune":
        yield "merged", sizes.dense, written, work.pruning, work.prune * count
    else:
        yield "merged", written, written, memory, 0.0


def _dense_first(recipe: Recipe, kind: Merge) -> bool:
    """Whether whole weights are written on the way: to be the result, pruned, or rounded."""
    integers = recipe.prune.values in LARGEST_CODE
    return kind.sparse not in PACKED_FIRST or (kind.sparse == "conflict_aware" and integers)


class _Seen(Stages):
    """Stages that only look: nothing is made, the folder of each is what it would be."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.done: set[str] = set()

    def run(self, name: str, inputs: Any, make: Callable[[Path], None]) -> Path:
        """The folder that stage `name` has or would have."""
        final = self.folder / f"{name}-{digest(inputs)}"
        if (final / RECORD).is_file():
            self.done.add(name)
        return final


def finished_stages(recipe: Recipe, work: Path) -> set[str]:
    """Names of the stages that a build would find done in `work`, by the digests of their inputs.

    An adapter that is not merged yet has no finished stage, nor has anything made from it.
    """
    maker = BUILDERS.get(recipe.compose.kind)
    ready = [expert for expert in recipe.experts if _is_merged(expert.model, recipe.base, work)]
    if maker is None or not ready or not work.is_dir():
        return set()
    if recipe.tokenizer == "union" and len(ready) < len(recipe.experts):
        return set()
    seen = _Seen(work)
    try:
        builder = maker(recipe.model_copy(update={"experts": ready}), seen)
    except InputError:
        return seen.done
    _ = builder.experts
    if len(ready) == len(recipe.experts):
        _ask(builder)
    return seen.done


def _ask(builder: Builder) -> None:
    """Name the later stages, as far as that takes no file of an earlier one that is not there."""
    kind = builder.recipe.compose
    asked: list[str] = ["chosen", "routed"] if isinstance(kind, Mixture | Routed) else []
    if isinstance(kind, Merge):
        asked = ["norms"] if kind.sparse == "conflict_aware" else []
        asked += ["weighed"] if kind.chooses_weight else []
        asked += ["dense"] if _dense_first(builder.recipe, kind) else []
        asked += ["packed", "made"] if kind.sparse in PACKED_FIRST else ["made"]
    for stage in asked:
        try:
            getattr(builder, stage)
        except (InputError, OSError):
            return


def _is_merged(model: str, base: str, work: Path) -> bool:
    """Whether a finetune is a full model, or an adapter that was merged in `work` before."""
    folder = local_folder(model)
    if not (folder / ADAPTER).is_file():
        return True
    name = digest([digest_of_model(folder), digest_of_model(local_folder(base))])
    return (work / "merged" / f"merged-{name}").is_dir()


def _duration(seconds: float) -> str:
    for unit, scale in (("h", 3600), ("min", 60)):
        if seconds >= scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
