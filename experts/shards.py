"""Write a checkpoint's weights tensor by tensor, so that never more than one shard is in memory."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from moiety.experts.checkpoint import INDEX
from moiety.files import write_json

SHARD_BYTES = 1 << 30


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> int:
    """Write tensors into `folder` as transformers lays them out; gives their bytes.

    One `model.safetensors` if they fit `shard_bytes`, else numbered shards and their index. The
    tensors are consumed as they come; the same ones in the same order give the same files.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}", {"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and _bytes(held) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    _name_shards(folder, shards, total)
    return total


def _bytes(held: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in held.values())


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
