"""Packed merges on disk: which matrices are packed, how the folder is written, what it holds.

O out features, I in features.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from moiety.errors import InputError
from moiety.experts.calibrate import decoder_blocks, linears_of
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.companions import copy_companions
from moiety.experts.delta import mark_task_vector
from moiety.experts.packing import Packed, check_packed, pack
from moiety.experts.pattern import Pattern
from moiety.experts.quantizer import PackedConfig
from moiety.experts.settings import PruneSettings
from moiety.experts.shards import write_weights
from moiety.experts.stream import skeleton
from moiety.experts.write import stored_bytes

Masked = tuple[Tensor, Tensor | None]
"""A tensor and, where it is to be packed, its mask."""


def modules_at(config: PretrainedConfig, sites: str) -> list[str]:
    """Full names of the linear layers that `sites` names in the blocks of an architecture."""
    prefix, blocks = decoder_blocks(skeleton(config))
    return [
        f"{prefix}.{index}.{name}"
        for index, block in enumerate(blocks)
        for name in linears_of(block, sites)
    ]


def write_dense(folder: Path, like: Checkpoint, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a stock checkpoint with the configuration, tokenizer and companions of `like`."""
    write_weights(folder, tensors)
    like.config.save_pretrained(folder)
    copy_companions(like.folder, folder)


def write_packed(
    folder: Path,
    like: Checkpoint,
    tensors: Iterable[tuple[str, Masked]],
    modules: Sequence[str],
    settings: PruneSettings,
    *,
    task_vector: bool = False,
) -> None:
    """Write a packed checkpoint with the configuration, tokenizer and companions of `like`.

    `tensors` come by their stock names, those of `modules` with a mask. With `task_vector` the
    packed ones are differences to `like`, and of the rest only what is not equal to it is
    written. Raises InputError that names a matrix which does not follow its mask.
    """
    write_weights(folder, _stored(like, tensors, settings, task_vector))
    config = copy.deepcopy(like.config)
    config.quantization_config = PackedConfig(
        pattern=str(Pattern.parse(settings.pattern)),
        modules=sorted(modules),
        values=settings.values,
    )
    if task_vector:
        mark_task_vector(config, like)
    config.save_pretrained(folder)
    copy_companions(like.folder, folder)


def _stored(
    like: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Masked]],
    settings: PruneSettings,
    task_vector: bool,
) -> Iterator[tuple[str, Tensor]]:
    pattern = Pattern.parse(settings.pattern)
    for name, (tensor, mask_OI) in tensors:
        if mask_OI is not None:
            try:
                packed = pack(tensor, pattern, settings.values, mask_OI=mask_OI)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
            yield from packed.tensors(name).items()
        elif not task_vector or not torch.equal(tensor, like[name]):
            yield name, tensor


def verified(
    folder: Path, base: Checkpoint, modules: Sequence[str], pattern: str
) -> dict[str, Any]:
    """Check matrix by matrix that a packed folder holds `modules` and nothing breaks `pattern`.

    Gives what was found: matrices, the share of their weights that is kept, bytes stored. Raises
    InputError that names the first matrix that is absent or breaks the pattern.
    """
    stored, expected = Checkpoint(folder), Pattern.parse(pattern)
    packing = PackedConfig.of(stored.config)
    named = [] if packing is None else packing.modules
    different = sorted(set(named) ^ set(modules))
    if packing is None or different:
        raise InputError(
            f"expected {len(modules)} packed matrices in {folder}, but it names {len(named)}; "
            f"{different[0] if different else 'all'} differ"
        )
    shapes, kept, places = base.shapes(), 0, 0
    for module in modules:
        name = f"{module}.weight"
        rows, columns = shapes[name][0]
        mask_OB, scale_OG = stored[f"{name}_mask"], stored.get(f"{name}_scale")
        packed = Packed(stored[name], mask_OB, scale_OG, rows, columns)
        check_packed(name, packed, expected)
        weight_OI = packed.dense()
        if not expected.holds(weight_OI):
            raise InputError(f"expected {name} in {folder} to follow {expected}, but it does not")
        kept, places = kept + int(weight_OI.count_nonzero()), places + weight_OI.numel()
    return {
        "pattern": str(expected),
        "matrices": len(modules),
        "kept_share": kept / places,
        "bytes": stored_bytes(stored),
        "dense_bytes": stored_bytes(base),
    }


def pooled(texts: Mapping[str, Sequence[str]]) -> list[str]:
    """Documents of all domains, about as much text of each: as much as the shortest one has.

    Calibrating on them sees every domain alike, as adding up their Gram matrices would.
    """
    left = {name: list(reversed(documents)) for name, documents in texts.items()}
    taken = dict.fromkeys(left, 0)
    found: list[str] = []
    while left[name := min(left, key=lambda name: (taken[name], bool(left[name])))]:
        found.append(left[name].pop())
        taken[name] += len(found[-1])
    return found
