"""Where a training run stands, on disk: one tensor file and the JSON that makes it current.

The tensor file is written first under a name of its own; then `state.json`, which names it,
is replaced in one step. A reader therefore sees the old state or the whole new one.
"""

import hashlib
import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.files import check_writable, digest, digest_of_file, read_json, sync, write_json
from moiety.routers.together import whole

STATE = "state.json"
SAMPLED = 64
"""Values looked at of each frozen tensor to tell one model from another."""


@dataclass(frozen=True)
class State:
    """All that a run needs to go on, whatever the number of processes.

    Tensors by name, the step, the history of evaluations, and the oracle's losses.
    """

    step: int
    oracle: dict[str, float]
    history: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def fingerprint(
    model: nn.Module,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    without: Collection[str] = (),
) -> str:
    """Name a run by its settings, its text (`tensors`, all of it) and its model (a sample).

    The model's tensors named in `without` do not count.
    """
    return digest(
        {
            "settings": settings,
            "text": {name: _bytes(tensor) for name, tensor in tensors.items()},
            "model": {
                name: _sample(tensor)
                for name, tensor in model.state_dict().items()
                if name not in without
            },
        }
    )


def _sample(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.numel() == 0:
        return str(type(tensor))
    flat = whole(tensor).flatten()
    step = max(1, flat.numel() // SAMPLED)
    return [str(tensor.dtype), list(tensor.shape), _bytes(flat[::step])]


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
        "oracle": state.oracle,
        "history": state.history,
        "tensors": name,
        "digest": digest_of_file(folder / name),
    }
    write_json(folder / STATE, content)
    for old in folder.glob("step-*.safetensors"):
        if old.name != name:
            old.unlink()


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
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
        step, history, owner = int(content["step"]), list(content["history"]), content["run"]
        oracle, checksum = dict(content["oracle"]), content["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"expected a training state in {folder / STATE}, but: {error}") from error
    if owner != run:
        raise InputError(
            f"expected the checkpoint in {folder} to be of this model, text and settings, but it "
            "is of another run; choose another folder or remove it"
        )
    return State(step, oracle, history, _read_tensors(path, checksum))


def _read_tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    try:
        if digest_of_file(path) != checksum:
            raise InputError(f"expected {path} to be as it was written, but it has changed")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"expected training tensors in {path}, but: {error}") from error
