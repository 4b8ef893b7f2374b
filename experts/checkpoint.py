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
from moiety.files import digest, digest_of_file, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
OTHER_FORMATS = ("consolidated*", "original/*", "onnx/*")
"""Files on the hub that hold the same weights again, for other software."""


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
        return Path(
            huggingface_hub.snapshot_download(
                str(model), allow_patterns=[*MODEL_FILES], ignore_patterns=[*OTHER_FORMATS]
            )
        )
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
            return self._sharded()
        single = self.folder / SINGLE
        if not single.is_file():
            raise InputError(_no_weights(self.folder))
        return dict.fromkeys(self._names_in(single), single)

    def _sharded(self) -> dict[str, Path]:
        index = read_json(self.folder / INDEX)
        weights = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weights, dict) or not weights:
            raise InputError(f"expected a weight_map in {self.folder / INDEX}, but it has none")
        files = {tensor: self.folder / Path(file).name for tensor, file in weights.items()}
        held = {file: set(self._names_in(file)) for file in sorted(set(files.values()))}
        absent = sorted(tensor for tensor, file in files.items() if tensor not in held[file])
        if absent:
            raise InputError(
                f"expected tensor {absent[0]} in {files[absent[0]]}, as {INDEX} says, "
                "but it is missing; the files are incomplete"
            )
        return files

    def _names_in(self, file: Path) -> list[str]:
        if not file.is_file():
            raise InputError(f"expected the weight file {file}, but it is missing")
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


def _no_weights(folder: Path) -> str:
    """Why a folder without safetensors weights is refused."""
    expected = f"expected weights in {folder} ({SINGLE} or {INDEX}), but "
    if (folder / ADAPTER).is_file():
        return (
            f"{expected}it holds a PEFT adapter; merge it into its base first with "
            "moiety.experts.source.resolve"
        )
    pickled = sorted(file.name for file in folder.glob("*.bin*"))
    if pickled:
        return (
            f"{expected}it holds {pickled[0]}, a pickle that can run code when it is opened; "
            "if you trust it, convert it with "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW)"
        )
    return (
        f"{expected}there are none; only safetensors checkpoints are read, so convert others with "
        "transformers' from_pretrained and save_pretrained"
    )


def digest_of_model(folder: Path) -> str:
    """Name a model by the contents of its weight, configuration and tokenizer files."""
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    return digest({file.name: digest_of_file(file) for file in files if file.is_file()})
