"""Open a composite, know its experts, and write new gates into it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

import moiety.compose.routed
import moiety.experts.quantizer  # noqa: F401
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint, local_folder
from moiety.experts.preflight import load_tokenizer
from moiety.files import sync
from moiety.routers import find_gates
from moiety.routers.together import process_count, whole

Spread = Literal["none", "weights", "experts"]


@dataclass(frozen=True)
class Composite:
    """A composite in memory: its model, its tokenizer and its experts' names in order."""

    folder: Path
    model: PreTrainedModel
    tokenizer: Any
    experts: tuple[str, ...]

    def own_expert(self, domains: Mapping[str, Any]) -> dict[str, int]:
        """Index of the expert that bears each domain's name; InputError when one has none."""
        strange = sorted(set(domains) - set(self.experts))
        if strange:
            raise InputError(
                f"expected domains named like the experts ({', '.join(self.experts)}), "
                f"but got {', '.join(strange)}"
            )
        return {domain: self.experts.index(domain) for domain in domains}


def open_composite(
    model: str | Path, dtype: str | torch.dtype = "auto", *, spread: Spread = "none"
) -> Composite:
    """Open a composite or any other transformers MoE (folder or hub id) with its tokenizer.

    `spread` says what of it each process of a `torchrun` holds: everything, a share of all
    `weights` (FSDP), or so and `experts` of its own (expert parallelism). Raises InputError when
    there is no such model, it is no MoE, its files are damaged, or it cannot be spread so.
    """
    folder = local_folder(model)
    spreading = {} if spread == "none" else {"distributed_config": _distributed(spread)}
    try:
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **spreading).eval()
    except ValueError as error:
        if spread == "none" or isinstance(error, InputError):
            raise
        raise InputError(f"expected a model whose {spread} can be spread, but: {error}") from error
    except (OSError, RuntimeError) as error:
        raise InputError(f"expected a model in {folder}, but: {error}") from error
    gates = find_gates(network)
    named = getattr(network.config, "moiety", None) or {}
    experts = named.get("experts") or [f"expert {index}" for index in range(gates[0].experts)]
    return Composite(folder, network, load_tokenizer(folder), tuple(experts))


def _distributed(spread: Spread) -> DistributedConfig:
    processes = process_count()
    if processes < 2:
        raise InputError(
            f"expected several processes to spread {spread} over, but there is one; start under "
            "torchrun or accelerate launch"
        )
    experts = processes if spread == "experts" else 1
    return DistributedConfig(fsdp_size=processes, ep_size=experts)


def gate_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the gates have learned, by its names in the model; every process has to ask."""
    return {
        f"{gate.name}.{name}": whole(tensor.detach()).cpu().contiguous()
        for gate in find_gates(model)
        for name, tensor in gate.module.state_dict().items()
    }


def save_gates(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write gates (of `gate_weights`) into the checkpoint in `folder`; no other tensor changes.

    Each weight file is replaced in one step, so a reader sees the old gates or the new ones.
    """
    checkpoint = Checkpoint(folder)
    gates = {_on_disk(name, checkpoint): gate for name, gate in weights.items()}
    for file in sorted(set(checkpoint.files.values())):
        names = [name for name, place in checkpoint.files.items() if place == file]
        if any(name in gates for name in names):
            _rewrite(file, {name: gates[name] for name in names if name in gates})


def _on_disk(name: str, checkpoint: Checkpoint) -> str:
    """The name that a gate's weight has in the files, which some architectures spell otherwise."""
    mixtral = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    granite = name.replace(".router.weight", ".router.layer.weight")
    for spelling in (name, mixtral, granite):
        if spelling in checkpoint:
            return spelling
    raise InputError(f"expected tensor {name} in {checkpoint.folder}, but there is none")


def _rewrite(file: Path, changed: Mapping[str, Tensor]) -> None:
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    tensors.update({name: tensor.to(tensors[name].dtype) for name, tensor in changed.items()})
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, scratch, metadata=metadata)
        sync(scratch)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)
