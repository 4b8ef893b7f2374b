"""Where a training run stands, on disk: one tensor file and the JSON that makes it current.

The tensor file is written first under a name of its own; then `state.json`, which names it, is
replaced in one step. A reader therefore sees the old state or the whole new one.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moiety.errors import InputError
from moiety.files import check_writable, digest_of_file, read_json, sync, write_json

STATE = "state.json"
SAMPLED = 64
"""Values looked at of each tensor of a model to tell it from another."""


def digest_of_tensor(tensor: Tensor) -> str:
    """The digest of all its bytes."""
    flat = tensor.detach().cpu().flatten().contiguous()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def digest_of_sample(tensor: Tensor) -> list[Any]:
    """Its dtype, its shape and the digest of a sample of its values."""
    flat = tensor.detach().flatten()
    step = max(1, flat.numel() // SAMPLED)
    return [str(tensor.dtype), list(tensor.shape), digest_of_tensor(flat[::step])]


def save_state(
    folder: Path, run: str, step: int, tensors: Mapping[str, Tensor], more: dict[str, Any]
) -> None:
    """Make step `step` of `run` the current one of `folder`; older tensor files are removed.

    `more` is JSON to keep beside the tensors. Raises OutputError when the folder cannot be written.
    """
    check_writable(folder)
    name = f"step-{step:08d}.safetensors"
    _write_tensors(folder / name, tensors)
    own = {"run": run, "step": step, "tensors": name, "digest": digest_of_file(folder / name)}
    write_json(folder / STATE, own | more)
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


def load_state(folder: Path, run: str, of: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The JSON and tensors current in `folder`, or None when no run has been there.

    `of` says in an error what makes a run the same. Raises InputError when the state belongs to
    another run or a file is damaged.
    """
    if not (folder / STATE).exists():
        return None
    content = read_json(folder / STATE)
    try:
        path = folder / Path(content["tensors"]).name
        content["step"] = int(content["step"])
        owner, checksum = content["run"], content["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder, error) from error
    if owner != run:
        raise InputError(
            f"expected the checkpoint in {folder} to be of {of}, but it is of another run; choose "
            "another folder or remove it"
        )
    return content, _read_tensors(path, checksum)


def damaged(folder: Path, error: Exception) -> InputError:
    """What to raise where the JSON is not that of a training state."""
    return InputError(f"expected a training state in {folder / STATE}, but: {error}")


def _read_tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    try:
        if digest_of_file(path) != checksum:
            raise InputError(f"expected {path} to be as it was written, but it has changed")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"expected training tensors in {path}, but: {error}") from error
