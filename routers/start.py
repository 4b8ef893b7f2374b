"""Fitted gates kept beside a training state, so that a stopped run does not fit them again.

Another number of threads or processes rounds a fit otherwise, which would make another run of it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moiety.errors import InputError
from moiety.files import check_writable, digest_of_file, read_json, sync, write_json
from moiety.routers.fit import FitReport
from moiety.routers.heldback import GateFit

STARTED, GATES = "start.json", "start.safetensors"


def save_start(folder: Path, run: str, gates: Mapping[str, Tensor], report: FitReport) -> None:
    """Keep fitted gates, by name, and the report of the fit of the run named `run`.

    Raises OutputError when the folder cannot be written.
    """
    check_writable(folder)
    save_file({name: tensor.cpu().contiguous() for name, tensor in gates.items()}, folder / GATES)
    sync(folder / GATES)
    content = {"run": run, "digest": digest_of_file(folder / GATES), "report": asdict(report)}
    write_json(folder / STARTED, content)


def load_start(folder: Path, run: str) -> tuple[dict[str, Tensor], FitReport] | None:
    """What `save_start` kept, or None when no fit was finished there.

    Raises InputError when it belongs to another run or a file is damaged.
    """
    if not (folder / STARTED).exists():
        return None
    content = read_json(folder / STARTED)
    try:
        if content["run"] != run:
            raise InputError(
                f"expected the checkpoint in {folder} to be of this model, text and settings, but "
                "it is of another run; choose another folder or remove it"
            )
        if content["digest"] != digest_of_file(folder / GATES):
            raise InputError(f"expected {folder / GATES} to be as it was written, but it differs")
        return load_file(folder / GATES), _report(content["report"])
    except (KeyError, TypeError, OSError, SafetensorError) as error:
        raise InputError(f"expected fitted gates in {folder}, but: {error}") from error


def _report(values: dict[str, Any]) -> FitReport:
    return FitReport(**{**values, "gates": tuple(GateFit(**one) for one in values["gates"])})
