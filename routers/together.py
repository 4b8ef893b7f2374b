"""What several processes do as one: tensors spread over them, and what the first one decides."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

Value = TypeVar("Value")


def process_count() -> int:
    """How many processes `torchrun` or `accelerate launch` started; 1 without them."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> None:
    """Make the process group of a launch of several processes, unless it is there."""
    if process_count() > 1 and not torch.distributed.is_initialized():
        PartialState(cpu=device.type == "cpu")


def several() -> bool:
    """Whether there is a process group of more than one process."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return not several() or torch.distributed.get_rank() == 0


def is_sharded(model: nn.Module) -> bool:
    """Whether any part of a model has been given to `fully_shard`."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, where processes hold shares of it; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(place: Tensor, value: Tensor) -> None:
    """Copy a whole `value`, the same on every process, into `place` or this process's share."""
    if not isinstance(place, DTensor):
        place.copy_(value)
        return
    value = value.to(device=place.device, dtype=place.dtype)
    shares = distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)
    place.to_local().copy_(shares.to_local())


def from_first(make: Callable[[], Value]) -> Value:
    """What `make` gives on the first process, on all of them; its error too is raised on all."""
    if not several():
        return make()
    found: list[object] = [None, None]
    if is_first():
        try:
            found = [make(), None]
        except Exception as error:
            found = [None, error]
    torch.distributed.broadcast_object_list(found)
    value, error = found
    if isinstance(error, Exception):
        raise error
    return value  # pyright: ignore[reportReturnType]


def wait() -> None:
    """Let every process come to this point."""
    if several():
        torch.distributed.barrier()
