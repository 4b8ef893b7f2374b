"""Weights written as they come: any dtype and shape, in shards, never more than one in memory."""

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moiety.experts.checkpoint import Checkpoint
from moiety.experts.shards import write_weights

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


def drawn() -> dict[str, Tensor]:
    """Tensors of odd sizes in every dtype, bytes first, so that nothing is aligned by chance."""
    generator = torch.Generator().manual_seed(0)
    found = {"odd": torch.randint(0, 255, (3, 7), generator=generator).to(torch.uint8)}
    for number, dtype in enumerate(reversed((*FLOATS, *WHOLE))):
        values = torch.randint(-100, 100, (5, 3 + number), generator=generator)
        found[f"of.{dtype}"] = values.to(dtype)
    turned = torch.randn(4, 6, generator=generator).t()
    return {**found, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "turned": turned}


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = drawn()
    total = write_weights(tmp_path, tensors.items())
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    check(load_file(tmp_path / "model.safetensors"), tensors)


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = drawn()
    total = write_weights(tmp_path, tensors.items(), shard_bytes=200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == total
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 3
    assert len(list(tmp_path.iterdir())) == len(files) + 1
    check(dict(Checkpoint(tmp_path)), tensors)


def test_the_same_tensors_give_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, drawn().items())
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    write_weights(tmp_path, drawn().items())
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, tensor in drawn().items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_nothing_to_write_is_an_empty_file(tmp_path: Path) -> None:
    assert write_weights(tmp_path, []) == 0
    assert load_file(tmp_path / "model.safetensors") == {}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 5000])
def test_a_tensor_is_gone_before_the_next_is_asked_for(tmp_path: Path, shard_bytes: int) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(6):
            gc.collect()
            assert all(one() is None for one in alive)
            tensor = torch.full((32, 32), float(number))
            alive.append(weakref.ref(tensor))
            yield str(number), tensor
            del tensor

    write_weights(tmp_path, tensors(), shard_bytes)
    assert Checkpoint(tmp_path)["5"].eq(5).all()
