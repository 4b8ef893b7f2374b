"""Write a checkpoint's weights tensor by tensor, so that never more than one is in memory."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from moiety.experts.checkpoint import INDEX
from moiety.files import write_json

SHARD_BYTES = 1 << 30
COPIED_AT_ONCE = 1 << 24
ALIGNMENT = 8


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> int:
    """Write tensors into `folder` as transformers lays them out; gives their bytes.

    One `model.safetensors` if they fit `shard_bytes`, else numbered shards and their index. The
    tensors are consumed as they come and go to disk at once, where the last shard is there twice
    for a moment; the same ones in the same order give the same files.
    """
    shards, total = [_Shard(folder / "shard-0")], 0
    for name, tensor in tensors:
        if shards[-1].places and shards[-1].bytes + tensor.nbytes > shard_bytes:
            shards[-1].finish()
            shards.append(_Shard(folder / f"shard-{len(shards)}"))
        shards[-1].append(name, tensor)
        total += tensor.nbytes
        del tensor
    shards[-1].finish()
    _name_shards(folder, shards, total)
    return total


class _Shard:
    """One safetensors file. Its header names every place, so the values lie in a spool until then.

    The widest dtypes come first and those of one width by name, as the format asks for aligned
    tensors.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.spool = file.with_name(f"{file.name}.spool")
        self.places: dict[str, tuple[Tensor, int]] = {}
        """Each tensor without its values, and where in the spool those begin."""
        self.bytes = 0
        self.spool.touch()

    def append(self, name: str, tensor: Tensor) -> None:
        """Put a tensor behind the others."""
        self.places[name] = (tensor.to("meta"), self.bytes)
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with self.spool.open("ab") as spool:
            spool.write(values.numpy().data)
        self.bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the file from the spool and remove that."""
        names = sorted(self.places, key=lambda name: (-self.places[name][0].itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            tensor, _ = self.places[name]
            start, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _name_of(tensor.dtype),
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        with self.file.open("wb") as file, self.spool.open("rb") as spool:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor, offset = self.places[name]
                spool.seek(offset)
                _copy(spool, file, tensor.nbytes)
        self.spool.unlink()


def _copy(source: BinaryIO, target: BinaryIO, left: int) -> None:
    while left:
        piece = source.read(min(left, COPIED_AT_ONCE))
        target.write(piece)
        left -= len(piece)


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype, as its own writer has it."""
    written = save({"of": torch.empty(0, dtype=dtype)})
    return json.loads(written[8:])["of"]["dtype"]


def _name_shards(folder: Path, shards: list[_Shard], total: int) -> None:
    if len(shards) == 1:
        shards[0].file.replace(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        shard.file.replace(folder / file)
        weight_map.update(dict.fromkeys(shard.places, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
