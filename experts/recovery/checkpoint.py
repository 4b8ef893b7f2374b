"""Where a recovery run stands, on disk: a tensor file, and the JSON that makes it current.

The tensor file is written first under a name of its own; then `state.json`, which names it, is
replaced in one step. A reader therefore sees the old state or the whole new one.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moiety.errors import InputError
from moiety.experts.recovery.settings import Evaluation
from moiety.files import check_writable, digest, digest_of_file, read_json, sync, write_json

STATE = "state.json"
SAMPLED = 64
"""Values looked at of each tensor of a model to tell it from another."""


@dataclass(frozen=True)
class State:
    """All that a run needs to go on: step, evaluations so far, tensors by name."""

    step: int
    history: list[Evaluation]
    tensors: dict[str, Tensor]


def fingerprint(
    settings: Mapping[str, Any], text: Mapping[str, Tensor], models: Mapping[str, Tensor]
) -> str:
    """Name a run by its settings, its text (all of it) and its models (a sample of them)."""
    return digest(
        {
            "settings": dict(settings),
            "text": {name: _bytes(tensor) for name, tensor in text.items()},
            "models": {name: _sample(tensor) for name, tensor in models.items()},
        }
    )


def _sample(tensor: Tensor) -> Any:
    flat = tensor.detach().flatten()
    return [str(tensor.dtype), list(tensor.shape), _bytes(flat[:: max(1, len(flat) // SAMPLED)])]


def _bytes(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().flatten().contiguous()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def save(folder: Path, run: str, state: State) -> None:
    """Make `state` the current one of `folder`; older tensor files are removed.

    Raises OutputError when the folder cannot be written.
    """
    check_writable(folder)
    name = f"step-{state.step:08d}.safetensors"
    _write_tensors(folder / name, state.tensors)
    content = {
        "run": run,
        "step": state.step,
        "history": [asdict(evaluation) for evaluation in state.history],
        "tensors": name,
        "digest": digest_of_file(folder / name),
    }
    write_json(folder / STATE, content)
    for old in folder.glob("step-*.safetensors"):
        if old.name != name:
            old.unlink()


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, scratch)
        sync(Path(scratch))
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def load(folder: Path, run: str) -> State | None:
    """The current state of `folder`, or None when no run has been there.

    Raises InputError when it belongs to another run or a file is damaged.
    """
    if not (folder / STATE).exists():
        return None
    content = read_json(folder / STATE)
    try:
        path = folder / Path(content["tensors"]).name
        history = [Evaluation(**evaluation) for evaluation in content["history"]]
        step, owner, checksum = int(content["step"]), content["run"], content["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"expected a training state in {folder / STATE}, but: {error}") from error
    if owner != run:
        raise InputError(
            f"expected the checkpoint in {folder} to be of these models, text and settings, but "
            "it is of another run; choose another folder or remove it"
        )
    return State(step, history, _read_tensors(path, checksum))


def _read_tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    try:
        if digest_of_file(path) != checksum:
            raise InputError(f"expected {path} to be as it was written, but it has changed")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"expected training tensors in {path}, but: {error}") from error
