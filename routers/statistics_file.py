"""Gate statistics on disk, so that adding a domain does not read the others' text again."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moiety.errors import InputError
from moiety.files import digest_of_file, new_folder, read_json, write_json
from moiety.routers.statistics import GateStatistics

VERSION = 1
GATES, TENSORS = "gates.json", "statistics.safetensors"
FIELDS = ("gram_WW", "sum_EW", "count_E", "sample_NW", "label_N")


def save_statistics(folder: Path, statistics: list[GateStatistics]) -> None:
    """Write the statistics of all gates to a new folder, which is there complete or not at all.

    Raises OutputError when `folder` holds files or cannot be written.
    """
    tensors = {
        f"{index}.{name}": getattr(one, name).cpu().contiguous()
        for index, one in enumerate(statistics)
        for name in FIELDS
    }
    gates = [{"name": one.name, "layer": one.layer} for one in statistics]
    with new_folder(folder) as scratch:
        save_file(tensors, scratch / TENSORS)
        digest = digest_of_file(scratch / TENSORS)
        write_json(scratch / GATES, {"version": VERSION, "digest": digest, "gates": gates})


def load_statistics(folder: Path) -> list[GateStatistics]:
    """What `save_statistics` wrote, on the CPU.

    Raises InputError when the folder is not one of statistics, or is damaged.
    """
    content = read_json(folder / GATES)
    path = folder / TENSORS
    try:
        if content["version"] != VERSION or content["digest"] != digest_of_file(path):
            raise InputError(
                f"expected statistics of version {VERSION} in {folder} as they were written, but "
                "the version or the tensors differ; collect them again"
            )
        tensors = load_file(path)
        return [_statistics(gate, index, tensors) for index, gate in enumerate(content["gates"])]
    except (KeyError, TypeError, OSError, SafetensorError) as error:
        raise InputError(f"expected gate statistics in {folder}, but: {error}") from error


def _statistics(gate: Any, index: int, tensors: dict[str, torch.Tensor]) -> GateStatistics:
    fields = {name: tensors[f"{index}.{name}"] for name in FIELDS}
    return GateStatistics(name=str(gate["name"]), layer=int(gate["layer"]), **fields)
