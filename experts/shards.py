"""Write a checkpoint's weights tensor by tensor, so that never more than one is in memory."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import save_file
from torch import Tensor

from moiety.experts.checkpoint import INDEX
from moiety.files import write_json

SHARD_BYTES = 1 << 30
LENGTH_BYTES = 8
COPIED_BYTES = 1 << 24
METADATA = {"__metadata__": {"format": "pt"}}


@dataclass(frozen=True)
class _Part:
    """One tensor in a safetensors file of its own, until its shard is joined."""

    file: Path
    bytes: int
    item_bytes: int


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> int:
    """Write tensors into `folder` as transformers lays them out; gives their bytes.

    One `model.safetensors` if they fit `shard_bytes`, else numbered shards and their index. The
    tensors are consumed as they come and go to the disk at once; the same ones in the same order
    give the same files.
    """
    shards: list[list[str]] = []
    parts: dict[str, _Part] = {}
    total = 0

    def flush() -> None:
        _join(folder / f"shard-{len(shards)}", parts)
        shards.append(list(parts))
        parts.clear()

    for name, tensor in tensors:
        if parts and _bytes(parts) + tensor.nbytes > shard_bytes:
            flush()
        part = _Part(folder / f"part-{len(parts)}", tensor.nbytes, tensor.element_size())
        save_file({name: tensor.contiguous()}, part.file)
        parts[name] = part
        total += tensor.nbytes
        del tensor
    flush()
    _name_shards(folder, shards, total)
    return total


def _bytes(parts: Mapping[str, _Part]) -> int:
    return sum(part.bytes for part in parts.values())


def _join(file: Path, parts: Mapping[str, _Part]) -> None:
    """One safetensors file of all parts, which are removed; larger items first, so all are aligned."""
    names = sorted(parts, key=lambda name: (-parts[name].item_bytes, name))
    header: dict[str, Any] = dict(METADATA)
    end = 0
    for name in names:
        with parts[name].file.open("rb") as source:
            start, end = end, end + parts[name].bytes
            header[name] = {**_header(source)[name], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with file.open("wb") as joined:
        joined.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for name in names:
            with parts[name].file.open("rb") as source:
                _header(source)
                shutil.copyfileobj(source, joined, COPIED_BYTES)
            parts[name].file.unlink()


def _header(source: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file, which is then read up to its data."""
    return json.loads(source.read(int.from_bytes(source.read(LENGTH_BYTES), "little")))


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0").replace(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").replace(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
