"""Read checkpoints lazily, tensor by tensor, from local folders and hub ids alike."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from moiety.errors import InputError
from moiety.files import read_json

INDEX = "model.safetensors.index.json"


def local_folder(model: str | Path) -> Path:
    """The folder of a model: a local path as it is, a hub id downloaded (or found in the cache).

    Raises InputError when it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"expected a model folder at {path}, but it is a file")
    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"expected a model folder or a hub id, but {str(model)!r} is no folder here and the "
            f"hub gave: {str(error).splitlines()[0]}"
        ) from error


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of one model folder by name, each read from its safetensors file when asked."""

    def __init__(self, model: str | Path) -> None:
        self.folder = local_folder(model)
        self.files = self._index()

    def _index(self) -> dict[str, Path]:
        if (self.folder / INDEX).is_file():
            weights = read_json(self.folder / INDEX)["weight_map"]
            names = {name: self.folder / file for name, file in weights.items()}
            absent = sorted({str(path) for path in names.values() if not path.is_file()})
            if absent:
                raise InputError(f"expected the weight file {absent[0]}, but it is missing")
            return names
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise InputError(
                f"expected weights in {self.folder} (model.safetensors or {INDEX}), "
                "but there are none; only safetensors checkpoints are read"
            )
        return dict.fromkeys(self._names_in(single), single)

    def _names_in(self, file: Path) -> list[str]:
        try:
            with safe_open(file, "pt") as handle:
                return list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"expected a safetensors file at {file}, but: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, read from disk; InputError names it when the file is damaged."""
        file = self.files[name]
        try:
            with safe_open(file, "pt") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"expected tensor {name} in {file}, but: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.files))

    def __len__(self) -> int:
        return len(self.files)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor, from the file headers alone."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in sorted(set(self.files.values())):
            with safe_open(file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    part = handle.get_slice(name)
                    found[name] = (tuple(part.get_shape()), part.get_dtype())
        return found

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """The model's transformers configuration."""
        try:
            return AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise InputError(
                f"expected a transformers model in {self.folder}, but: {error}"
            ) from error
