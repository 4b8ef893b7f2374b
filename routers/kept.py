"""Gate statistics kept from one fit to the next, so that adding a domain reads its text alone.

One folder holds the merged sums of all domains so far and, for each, what tells whether they still
hold: its text, how it was read, and what every gate sees of its first window. That window goes to
the domain's own expert, so what it shows changes with the shared part and that expert only.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moiety.files import check_writable, digest, read_json, write_json
from moiety.progress import SILENT, Progress
from moiety.routers.fit import FitSettings
from moiety.routers.gates import Gate
from moiety.routers.statistics import GateStatistics, collect, merge
from moiety.routers.statistics_file import load_statistics, save_statistics
from moiety.routers.together import from_first
from moiety.text import Windows

KEPT, SUMS = "kept.json", "sums"
CLOSE = 1e-3
"""Relative difference of what a gate sees that rounding explains."""


def collect_or_keep(
    folder: Path,
    model: nn.Module,
    gates: Sequence[Gate],
    data: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    settings: FitSettings,
    progress: Progress = SILENT,
) -> list[GateStatistics]:
    """Statistics of `data`, read again only for the domains that `folder` does not hold.

    Everything is read again when a domain kept there has gone, or has other text, settings or
    features now; what `folder` holds afterwards is of `data`. Raises InputError as `collect`, or
    when the folder is damaged. Of several processes the first one reads and writes it.
    """
    seen = {
        name: _seen(model, gates, {name: windows}, own_expert, settings)
        for name, windows in data.items()
    }
    kept = from_first(lambda: _kept(folder, seen))
    missing = [name for name in data if name not in kept]
    if not missing:
        progress.note(f"gate statistics of {', '.join(data)}: kept in {folder}, used again")
        return _loaded(folder, gates)
    found = collect(
        model,
        gates,
        data,
        own_expert,
        only=missing,
        stitch=settings.stitch,
        shortest=settings.shortest,
        tokens=settings.tokens,
        sample=settings.logistic_tokens if settings.method == "logistic" else 0,
        seed=settings.seed,
        batch_size=settings.batch_size,
        progress=progress,
    )
    if kept:
        found = merge(_loaded(folder, gates), found)
    from_first(lambda: _keep(folder, found, seen))
    return found


def _seen(
    model: nn.Module,
    gates: Sequence[Gate],
    data: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    settings: FitSettings,
) -> dict[str, Any]:
    """What tells a domain's statistics from others."""
    [(name, windows)] = data.items()
    first = collect(model, gates, {name: windows.select(slice(1))}, own_expert, stitch=0)
    how = (settings.stitch, settings.shortest, settings.tokens, settings.seed)
    sample = settings.logistic_tokens if settings.method == "logistic" else 0
    return {
        "expert": own_expert[name],
        "read": digest([how, sample, windows.ids_WC.tolist(), windows.mask_WC.tolist()]),
        "features": [one.sum_EW[own_expert[name]].tolist() for one in first],
    }


def _kept(folder: Path, seen: Mapping[str, Any]) -> list[str]:
    """The domains whose kept statistics still hold; none unless all in the folder do."""
    if not (folder / KEPT).is_file():
        return []
    content = read_json(folder / KEPT)
    if not all(name in seen and _same(before, seen[name]) for name, before in content.items()):
        return []
    return list(content)


def _same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if any(before.get(name) != now[name] for name in ("expert", "read")):
        return False
    features = [torch.tensor(one) for one in before["features"]]
    expected = [torch.tensor(one) for one in now["features"]]
    return [one.shape for one in features] == [one.shape for one in expected] and all(
        float((one - other).norm()) <= CLOSE * float(other.norm())
        for one, other in zip(features, expected, strict=True)
    )


def _keep(folder: Path, statistics: list[GateStatistics], seen: Mapping[str, Any]) -> None:
    """Take away what was kept, then keep these; stopped in between, nothing counts as kept."""
    check_writable(folder)
    (folder / KEPT).unlink(missing_ok=True)
    shutil.rmtree(folder / SUMS, ignore_errors=True)
    save_statistics(folder / SUMS, statistics)
    write_json(folder / KEPT, seen)


def _loaded(folder: Path, gates: Sequence[Gate]) -> list[GateStatistics]:
    """The kept sums, with a row for every expert that the gates now have."""
    statistics = from_first(lambda: load_statistics(folder / SUMS))
    return [
        replace(
            one,
            gram_WW=one.gram_WW.to(weight_EW.device),
            sum_EW=_padded(one.sum_EW, gate.experts).to(weight_EW.device),
            count_E=_padded(one.count_E, gate.experts).to(weight_EW.device),
        )
        for one, gate, weight_EW in (
            (one, gate, gate.module.get_parameter("weight"))
            for one, gate in zip(statistics, gates, strict=True)
        )
    ]


def _padded(tensor_E: Tensor, experts: int) -> Tensor:
    missing = max(experts - len(tensor_E), 0)
    return torch.cat([tensor_E, tensor_E.new_zeros(missing, *tensor_E.shape[1:])])
