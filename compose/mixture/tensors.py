"""The tensors of a mixture, in the layout in which other engines read its architecture too.

E experts, D model width.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from moiety.compose.mixture.layout import Layout
from moiety.compose.shim import write_shim
from moiety.errors import InputError
from moiety.experts.architecture import Architecture
from moiety.experts.shards import write_weights

ENDS = ("", "_mask", "_scale")


def mixture_tensors(
    layout: Layout,
    shared: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    gates: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the mixture by their names on disk.

    `shared` gives everything that no expert has, dense; `experts` the FFN matrices (dense, or
    packed with their masks and scales); `gates` the weights (E, D) by their names in memory.
    `accounting` says what of them is not used. Raises InputError when a tensor is missing or the
    shared part is packed.
    """
    for name in shared:
        if layout.is_shared(name):
            if f"{name}_mask" in shared:
                raise InputError(f"expected a dense shared part, but {name} in it is packed")
            yield name, shared[name]
    for layer in layout.layers:
        yield layout.stored_gate(layer), gates[layout.gate(layer)]
        dtype = gates[layout.gate(layer)].dtype
        for template, shape in layout.family.neutral.items():
            sizes = [s if isinstance(s, int) else getattr(layout.dense, s) for s in shape]
            yield template.format(layer=layer), torch.zeros(sizes, dtype=dtype)
        for template, matrices in layout.family.places.stored.items():
            yield from _stored(template, layer, matrices, experts)


def _stored(
    template: str, layer: int, matrices: Sequence[str], experts: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """What `template` holds in one layer: each expert's matrices or the stack of all experts'."""
    names = [f"model.layers.{layer}.mlp.{matrix}.weight" for matrix in matrices]
    for end in ENDS:
        if end and not any(f"{names[0]}{end}" in expert for expert in experts):
            continue
        found = (_joined(experts, number, names, end) for number in range(len(experts)))
        if "{expert}" in template:
            for number, tensor in enumerate(found):
                yield f"{template.format(layer=layer, expert=number)}{end}", tensor
        else:
            yield f"{template.format(layer=layer)}{end}", torch.stack(list(found))


def _joined(
    experts: Sequence[Mapping[str, Tensor]], number: int, names: Sequence[str], end: str
) -> Tensor:
    for name in names:
        if f"{name}{end}" not in experts[number]:
            raise InputError(f"expected tensor {name}{end}, but expert {number} has none")
    parts = [experts[number][f"{name}{end}"] for name in names]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def zero_gates(layout: Layout, experts: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gates that prefer no expert, (E, D) each, by the names of their weights in memory."""
    shape = (experts, layout.dense.hidden_size)
    return {layout.gate(layer): torch.zeros(shape, dtype=dtype) for layer in layout.layers}


def write_mixture(
    folder: Path,
    config: PretrainedConfig,
    tensors: Iterator[tuple[str, Tensor]],
    tokenizer: Any,
    generation: GenerationConfig | None,
) -> None:
    """Write a checkpoint that `AutoModelForCausalLM.from_pretrained` opens, one shard in memory.

    Raises InputError unless the tensors are exactly those of the architecture.
    """
    written: set[str] = set()

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            written.add(name)
            yield name, tensor

    write_weights(folder, noted())
    _check_complete(written, config)
    config.save_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        write_shim(folder, type(config))
    tokenizer.save_pretrained(folder)
    if generation is not None:
        generation.save_pretrained(folder)


def _check_complete(written: Set[str], config: PretrainedConfig) -> None:
    expected = set(Architecture(config).shapes)
    missing = sorted(expected - written)
    if missing:
        raise InputError(
            f"expected tensor {missing[0]} in the mixture, but no input gives it "
            f"({len(missing)} are missing)"
        )
    parts = {f"{name}{end}" for name in expected for end in ENDS}
    strange = sorted(written - parts)
    if strange:
        raise InputError(f"expected no tensor {strange[0]}, for which a mixture has no place")
