"""Writing weights: readable, aligned, the same each time, and one tensor in memory."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from moiety.experts.checkpoint import Checkpoint
from moiety.experts.shards import write_weights


def mixed() -> dict[str, Tensor]:
    """Tensors of odd sizes and many dtypes, in no order."""
    generator = torch.Generator().manual_seed(0)
    return {
        "mask": torch.randint(0, 255, (3, 5), generator=generator).to(torch.uint8),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "turned": torch.randn(3, 4, generator=generator).T,
        "a": torch.randn(3, 3, generator=generator).half(),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(3),
        "empty": torch.empty(0, 4),
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    total = write_weights(tmp_path, mixed().items())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert total == sum(tensor.nbytes for tensor in found.values())
    assert found.keys() == mixed().keys()
    for name, tensor in mixed().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    write_weights(tmp_path, mixed().items())
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, tensor in mixed().items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_shards_hold_everything_once(tmp_path: Path) -> None:
    write_weights(tmp_path, mixed().items(), shard_bytes=40)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found = Checkpoint(tmp_path)
    assert found.keys() == mixed().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in mixed().items())
    assert not list(tmp_path.glob("part-*"))


def test_nothing_to_write_is_an_empty_file(tmp_path: Path) -> None:
    assert write_weights(tmp_path, []) == 0
    assert load_file(tmp_path / "model.safetensors") == {}


def test_a_tensor_is_gone_before_the_next_is_made(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(3):
            tensor = torch.full((4,), float(number))
            held = weakref.ref(tensor)
            yield f"t{number}", tensor
            del tensor
            assert held() is None

    write_weights(tmp_path, tensors())
