"""Weights spread over processes while gates train: for models larger than one device.

Either `shard` spreads those of a model in memory, or transformers opens one so
(`from_pretrained(distributed_config=...)`): with `fsdp_size` all of them are spread, the gates
among them, with `ep_size` every process also has experts of its own, to which tokens travel.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from moiety.errors import InputError
from moiety.routers.masters import gate_weights
from moiety.routers.passes import linear_gates


def shard(model: nn.Module, blocks: Iterable[nn.Module] | None = None) -> None:
    """Keep a share of every frozen parameter on each process, gates whole on all of them.

    PyTorch's `fully_shard` (FSDP2): a block's parameters are gathered as the pass reaches it and
    let go after. `blocks` are those gathered together, by default the model's decoder layers (its
    `_no_split_modules`). `train` takes the model as it does any other. In place and for good, on
    the process group's devices. Buffers stay whole on every process. Raises InputError outside
    `torchrun` or `accelerate launch`, and for a model without linear gates.
    """
    if not torch.distributed.is_initialized():
        raise InputError(
            "expected a process group to shard over, but there is none; start under torchrun and "
            "make accelerate's PartialState() first"
        )
    gates = set(gate_weights(linear_gates(model)).values())
    for block in _layers(model) if blocks is None else blocks:
        fully_shard(block, ignored_params=gates)
    fully_shard(model, ignored_params=gates)


def check_batches(model: nn.Module) -> None:
    """Raise InputError where processes have to run the same batch, as with tensor parallelism."""
    size = getattr(model, "_tp_size", None) or 1
    if size > 1:
        raise InputError(
            "expected processes that each run windows of their own, but the model is spread over "
            f"{size} by tensor parallelism; open it with fsdp_size (and ep_size) instead of tp_size"
        )


def let_go(model: nn.Module) -> None:
    """Drop the parameters gathered by the last pass, which else stay whole on every process."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _layers(model: nn.Module) -> list[nn.Module]:
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
