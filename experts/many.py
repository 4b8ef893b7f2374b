"""Prune many finetunes: one after the other, or shared out over the processes of a launcher."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState

from moiety.errors import InputError
from moiety.experts.checkpoint import local_folder
from moiety.experts.device import CPU, CUDA, check_device
from moiety.experts.preflight import check_combination, check_same_shape
from moiety.experts.prune import PruneReport, prune, read_report
from moiety.experts.settings import PruneSettings
from moiety.progress import SILENT, Progress
from moiety.text import read_documents

SHARED_MASK = "shared-mask"


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """One finetune to prune: its name (the output folder's), its model and its own text."""

    name: str
    model: str | Path
    data: str | Path | Sequence[str]

    def documents(self) -> list[str]:
        """The text, read."""
        if isinstance(self.data, str | Path):
            return read_documents(self.data)
        return list(self.data)


def prune_many(
    finetunes: Sequence[Finetune],
    out: str | Path,
    settings: PruneSettings | None = None,
    progress: Progress = SILENT,
    *,
    base: str | Path | None = None,
    masks: str | Path | None = None,
    shared_mask: str | Path | None = None,
) -> dict[str, PruneReport]:
    """Prune each finetune into `out/NAME`; gives the reports by name.

    Started by `accelerate launch` or torchrun, every process takes its share, on a GPU of its own
    if the device is `cuda`; with equally many threads a process, the files are those of a single
    process. With `shared_mask`, a base model, one mask is chosen on that base with the text of all
    finetunes (kept as `out/shared-mask`) and every finetune's values are fitted to it, so that any
    weighted sum of the results still follows the pattern. Started again, it goes on; what is done
    is not done again. Raises as `prune` does.
    """
    settings, out = settings or PruneSettings(), Path(out)
    names = [tune.name for tune in finetunes]
    _check_names(names)
    if shared_mask is not None and masks is not None:
        raise InputError(
            "expected masks or a base to choose a shared mask on, not both; leave one of them out"
        )
    check_device(settings.device)
    check_combination(settings, base, shared_mask or masks)
    _check_inputs(finetunes, shared_mask)
    state = PartialState(cpu=settings.device == CPU)
    if settings.device == CUDA:
        settings = replace(settings, device=str(state.device))
    if shared_mask is not None:
        masks = out / SHARED_MASK
        if state.is_main_process:
            progress.note(f"one mask for all, chosen on {shared_mask}")
            rounds = itertools.zip_longest(*(tune.documents() for tune in finetunes))
            texts = [text for texts in rounds for text in texts if text is not None]
            prune(shared_mask, masks, texts, settings, progress, reuse=True)
        state.wait_for_everyone()
    mine = finetunes[state.process_index :: state.num_processes]
    for tune in progress.track(mine, "finetunes", len(mine)):
        progress.note(f"{tune.name}: {tune.model}")
        folder, data = out / tune.name, tune.data
        prune(tune.model, folder, data, settings, progress, base=base, masks=masks, reuse=True)
    state.wait_for_everyone()
    return {name: read_report(out / name) for name in names}


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) != len(names) or SHARED_MASK in names:
        raise InputError(f"expected different names, none {SHARED_MASK}, but they are {names}")
    for name in names:
        if name in ("", "..") or Path(name).name != name:
            raise InputError(
                f"expected names that can be folders in the output folder, but one is {name!r}; "
                "use letters, digits, dots and dashes"
            )


def _check_inputs(finetunes: Sequence[Finetune], shared_mask: str | Path | None) -> None:
    """Refuse what only a later finetune would show: no model, no text, another architecture."""
    for tune in finetunes:
        local_folder(tune.model)
        tune.documents()
        if shared_mask is not None:
            check_same_shape(shared_mask, tune.model)
