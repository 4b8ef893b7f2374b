"""Prune one finetune: block by block, resumable, into a packed model."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moiety.errors import InputError, OutputError
from moiety.experts.blocks import BlockPruner, BlockResult, allocate
from moiety.experts.companions import copy_companions
from moiety.experts.delta import base_of, mark_task_vector
from moiety.experts.device import check_device
from moiety.experts.journal import Journal, fingerprint
from moiety.experts.matrix import MatrixReport
from moiety.experts.pattern import Pattern
from moiety.experts.preflight import (
    check_base,
    check_combination,
    check_matrices,
    check_values,
    check_vocabulary,
    load_tokenizer,
)
from moiety.experts.recovery.block import BlockRecovery
from moiety.experts.settings import PruneSettings
from moiety.experts.shards import write_weights
from moiety.experts.source import resolve
from moiety.experts.stream import StreamedModel
from moiety.experts.unpack import dense_view
from moiety.experts.write import PrunedWeights, packed_config, stored_bytes
from moiety.files import check_new_folder, digest, new_folder, read_json, write_json
from moiety.progress import SILENT, Progress
from moiety.text import packed_windows, read_documents
from moiety.version import __version__

REPORT = "pruning.json"


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What pruning did; all but `seconds` and `blocks_resumed` is also in `pruning.json`.

    `errors` are the means over the matrices of each step's relative output error, `recovery` the
    figures of each block's reconstruction, `rounds` the patterns and errors of earlier rounds.
    """

    settings: PruneSettings
    calibration_tokens: int
    dense_bytes: int
    packed_bytes: int
    errors: dict[str, float]
    matrices: list[MatrixReport]
    recovery: list[dict[str, Any]]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    blocks_resumed: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        return asdict(self)


def prune(
    model: str | Path,
    out: str | Path,
    data: str | Path | Sequence[str],
    settings: PruneSettings | None = None,
    progress: Progress = SILENT,
    *,
    base: str | Path | None = None,
    masks: str | Path | None = None,
    work: str | Path | None = None,
    reuse: bool = False,
) -> PruneReport:
    """Prune a model on its own domain's text and write a packed one to `out`.

    `model` is a folder, a hub id or a PEFT adapter; `data` a corpus (see
    `moiety.text.read_documents`) or a list of documents. With `base`, what is pruned is the task
    vector, and the base stays dense (open the result with `open_delta`). With `masks`, a packed
    model, its masks are taken over and only the values are fitted. Otherwise the result opens
    through `AutoModelForCausalLM.from_pretrained` after `import moiety`.

    Finished blocks are kept in `work` (default: `OUT.pruning`) until all are done, so that the
    same call goes on after a kill; with `reuse`, a finished `out` of the same call is taken as it
    is. Raises InputError or OutputError before any long work when
    something does not fit.
    """
    start = time.perf_counter()
    settings, out = settings or PruneSettings(), Path(out)
    work = Path(work) if work else out.with_name(f"{out.name}.pruning")
    finished = reuse and (out / REPORT).is_file()
    if not finished:
        check_new_folder(out)
    check_device(settings.device)
    check_combination(settings, base, masks)
    run = _Run(model, data, settings, progress, work, base=base, masks=masks)
    plan = run.plan()
    if finished:
        return _found(out, plan, progress)
    rounds: list[Path] = []
    for number, pattern in enumerate(settings.schedule):
        step = replace(settings, pattern=pattern, schedule=(), values="fp32")
        folder = work / f"round-{number}-{digest([plan, pattern])}"
        progress.note(f"round {number + 1} of {len(settings.schedule) + 1}: {pattern}")
        if not folder.is_dir():
            before = _Run(model, data, step, progress, work)
            before.into(folder, digest(before.plan()))
        rounds.append(folder)
        model = folder
    if rounds:
        dense_bytes = run.dense_bytes
        run = _Run(model, data, settings, progress, work)
        run.dense_bytes = dense_bytes
    report = run.into(out, digest(plan), [_figures_of_round(folder) for folder in rounds])
    for folder in rounds:
        shutil.rmtree(folder)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()
    return replace(report, seconds=time.perf_counter() - start)


def _found(out: Path, plan: dict[str, Any], progress: Progress) -> PruneReport:
    if read_json(out / REPORT).get("plan") != digest(plan):
        raise OutputError(
            f"expected {out} to be absent or the result of this very run, but it was made "
            "from another model, text or settings; choose another output folder or remove it"
        )
    progress.note(f"{out}: already pruned, used again")
    return read_report(out)


def read_report(folder: str | Path) -> PruneReport:
    """The report of a pruned folder."""
    values = read_json(Path(folder) / REPORT)
    settings = values["settings"]
    if settings["recovery"] is not None:
        settings["recovery"] = BlockRecovery.read(settings["recovery"])
    settings["schedule"] = tuple(settings["schedule"])
    matrices = [MatrixReport.read(row) for row in values["matrices"]]
    del values["plan"]
    return PruneReport(**values | {"settings": PruneSettings(**settings), "matrices": matrices})


def _figures_of_round(folder: Path) -> dict[str, Any]:
    report = read_json(folder / REPORT)
    return {"pattern": report["settings"]["pattern"], "errors": report["errors"]}


class _Run:
    """One round of pruning: its inputs, then its blocks, then what is written."""

    def __init__(
        self,
        model: str | Path,
        data: str | Path | Sequence[str],
        settings: PruneSettings,
        progress: Progress,
        work: Path,
        *,
        base: str | Path | None = None,
        masks: str | Path | None = None,
    ) -> None:
        self.settings, self.progress, self.work = settings, progress, work
        documents = read_documents(data) if isinstance(data, str | Path) else list(data)
        self.view = dense_view(resolve(model, work / "merged", base, progress))
        if base_of(self.view.config) is not None:
            raise InputError(
                f"expected whole weights in {model}, but it is a task vector; export it dense first"
            )
        self.base = None if base is None else dense_view(resolve(base, work / "merged"))
        if self.base is not None:
            check_base(self.view, self.base)
        self.masks = None if masks is None else dense_view(masks)
        tokenizer = load_tokenizer(self.view.folder)
        self.windows = packed_windows(
            tokenizer, documents, settings.context_length, settings.windows
        )
        self.dense_bytes = stored_bytes(self.view.raw)
        self.stream = StreamedModel(self.view.raw.config, self.view, settings.device)
        check_vocabulary(self.windows, self.view.config, self.view.folder)
        check_matrices(self.stream, settings, self.base, self.masks)
        check_values(self.stream, settings, self.view)

    def into(self, out: Path, plan: str, rounds: Sequence[dict[str, Any]] = ()) -> PruneReport:
        """Prune every block that is not done yet and write the model to `out`."""
        stream, blocks = self.stream, range(len(self.stream))
        journal = Journal(self.work, self.plan())
        resumed = sum(journal.finished(index) for index in blocks)
        if resumed:
            self.progress.note(f"{resumed} of {len(blocks)} blocks are already pruned")
        patterns = self._patterns(journal)
        masks = None if self.masks is None else self.masks.raw
        pruner = BlockPruner(stream, self.settings, patterns, self.base, masks, self.progress)
        batches = pruner.capture(self.windows)
        results: list[BlockResult] = []
        for index in self.progress.track(blocks, "prune blocks", len(blocks)):
            if journal.finished(index):
                result = BlockResult.read(*journal.read(index))
                pruner.repeat(index, batches, result)
            else:
                result = pruner.prune(index, batches)
                journal.write(index, result.tensors, result.figures())
            results.append(replace(result, tensors={}))
        batches.clear()
        report = self._write(out, plan, journal, results, rounds)
        journal.remove()
        return replace(report, blocks_resumed=resumed)

    def plan(self) -> dict[str, Any]:
        """Everything the result depends on, as JSON."""
        views = {"model": self.view, "base": self.base, "masks": self.masks}
        return {
            "version": __version__,
            **{name: fingerprint(view.raw) for name, view in views.items() if view is not None},
            "windows": digest(self.windows.ids_WC.tolist()),
            "settings": asdict(self.settings) | {"device": self.stream.device.type},
        }

    def _patterns(self, journal: Journal) -> list[Pattern]:
        """One pattern a block; measured once if they are to differ."""
        pattern = Pattern.parse(self.settings.pattern)
        if self.settings.allocation == "uniform":
            return [pattern] * len(self.stream)
        densities = journal.kept("densities")
        if densities is None:
            batches = self.stream.capture(self.windows, self.settings.batch_size)
            densities = allocate(self.stream, batches, self.settings, self.progress)
            journal.keep("densities", densities)
        return [Pattern.parse(f"{density:.4f}") for density in densities]

    def _write(
        self,
        out: Path,
        plan: str,
        journal: Journal,
        results: Sequence[BlockResult],
        rounds: Sequence[dict[str, Any]],
    ) -> PruneReport:
        matrices = [matrix for result in results for matrix in result.matrices]
        pruned = PrunedWeights(self.view, journal, results)
        config = packed_config(self.view, matrices, self.settings.pattern, self.settings.values)
        if self.base is not None:
            mark_task_vector(config, self.base.raw)
        with new_folder(out) as scratch:
            if self.base is None:
                packed_bytes = write_weights(scratch, pruned.tensors())
            else:
                packed_bytes = write_weights(scratch, pruned.task_vector(self.base))
            report = PruneReport(
                settings=self.settings,
                calibration_tokens=int(self.windows.mask_WC.sum()),
                dense_bytes=self.dense_bytes,
                packed_bytes=packed_bytes,
                errors=_means([matrix.errors for matrix in matrices]),
                matrices=matrices,
                recovery=[result.recovery for result in results if result.recovery is not None],
                rounds=list(rounds),
            )
            config.save_pretrained(scratch)
            copy_companions(self.view.folder, scratch)
            values = report.to_dict()
            del values["seconds"], values["blocks_resumed"]
            write_json(scratch / REPORT, {"plan": plan, **values})
        return report


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {step: sum(row[step] for row in rows) / len(rows) for step in rows[0]}
