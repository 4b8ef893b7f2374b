"""Sparse task vectors: a finetune as its dense base plus packed differences.

O out features, I in features, B mask bytes a row, G scales a row.
"""

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moiety.errors import InputError
from moiety.experts import kernels
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.companions import copy_companions
from moiety.experts.modules import PackedModule
from moiety.experts.packing import Packed, check_packed
from moiety.experts.pattern import Pattern
from moiety.experts.quantizer import PackedConfig
from moiety.experts.shards import write_weights
from moiety.experts.unpack import DenseView, dense_view
from moiety.files import new_folder

SECTION, BASE, DIGEST = "moiety", "task_vector_of", "base_digest"


class DeltaLinear(PackedModule):
    """A dense base layer plus a packed difference: `(W_base + Δ) x + b`.

    `delta` holds Δ's kept values, `delta_mask` (O, B) its mask, `delta_scale` (O, G) the scales
    of integer values.
    """

    def __init__(
        self, base: nn.Linear, delta: Packed, pattern: Pattern, values: str | None = None
    ) -> None:
        super().__init__(pattern, values)
        self.base = base
        self._hold_packed("delta", delta)
        self.prepare()

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        return self.base(input) + kernels.sparse_linear(input, self.weights("delta"))


def mark_task_vector(config: PretrainedConfig, base: Checkpoint) -> None:
    """Say in a configuration that the weights beside it are differences to `base`."""
    noted = getattr(config, SECTION, None) or {}
    setattr(config, SECTION, {**noted, BASE: str(base.folder), DIGEST: digest_of_weights(base)})


def base_of(config: PretrainedConfig) -> str | None:
    """The base that a checkpoint's weights are differences to; None if they are whole weights."""
    return (getattr(config, SECTION, None) or {}).get(BASE)


def is_task_vector(model: str | Path) -> bool:
    """Whether a folder or hub id holds differences to a base."""
    return base_of(Checkpoint(model).config) is not None


def digest_of_weights(checkpoint: Checkpoint) -> str:
    """Name a model by every tensor's name, shape, dtype and first and last row."""
    found = hashlib.sha256()
    for name in checkpoint:
        tensor = checkpoint[name]
        rows = torch.stack([tensor[0], tensor[-1]]) if tensor.ndim else tensor
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(rows.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


class TaskVector:
    """A folder of packed differences, together with the base they belong to.

    `base` is where the base is now, if it has moved. Raises InputError when the folder holds no
    task vector or the base is another model.
    """

    def __init__(self, folder: str | Path, base: str | Path | None = None) -> None:
        self.raw = Checkpoint(folder)
        self.config = self.raw.config
        recorded = base_of(self.config)
        if recorded is None:
            raise InputError(
                f"expected a task vector in {folder}, but it holds whole weights; open it with "
                "AutoModelForCausalLM.from_pretrained"
            )
        self.base = dense_view(base or recorded)
        expected = getattr(self.config, SECTION)[DIGEST]
        if digest_of_weights(self.base.raw) != expected:
            raise InputError(
                f"expected the base whose differences {folder} holds, but {self.base.raw.folder} "
                "is another model; give the folder of the right one as base"
            )
        packing = PackedConfig.of(self.config)
        assert packing is not None
        self.packing = packing

    def packed(self, module: str) -> Packed:
        """The difference of one module's weight; InputError names it when it is damaged."""
        name = f"{module}.weight"
        base_OI = self.base[name]
        mask_OB, scale_OG = self.raw[f"{name}_mask"], self.raw.get(f"{name}_scale")
        rows, columns = base_OI.shape
        packed = Packed(self.raw[name], mask_OB, scale_OG, rows, columns)
        check_packed(name, packed, self.packing.pattern_of(module))
        return packed

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The dense weights of the finetune: base plus differences, in the base's dtypes."""
        packed = {f"{module}.weight" for module in self.packing.modules}
        hidden = {f"{name}{end}" for name in packed for end in ("_mask", "_scale")}
        for name in sorted({*self.base, *self.raw} - hidden):
            if name in packed:
                base_OI = self.base[name]
                delta = self.packed(name.removesuffix(".weight"))
                yield name, (base_OI.float() + delta.dense().float()).to(base_OI.dtype)
            else:
                yield name, self.raw[name] if name in self.raw else self.base[name]


def open_delta(folder: str | Path, base: str | Path | None = None) -> PreTrainedModel:
    """Open a task vector: the base's weights dense, its differences packed (DeltaLinear).

    `base` says where the base is now, if not where it was. Raises InputError when the base is
    another model or a tensor is absent or damaged.
    """
    vector = TaskVector(folder, base)
    model = _stock(vector.config, vector.base, vector.raw, set(vector.packing.modules))
    for module in vector.packing.modules:
        parent, _, attribute = module.rpartition(".")
        linear = model.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        pattern, values = vector.packing.pattern_of(module), vector.packing.values
        delta = DeltaLinear(linear, vector.packed(module), pattern, values)
        setattr(model.get_submodule(parent), attribute, delta)
    return model.eval()


def _stock(
    config: PretrainedConfig, base: DenseView, raw: Checkpoint, packed: set[str]
) -> PreTrainedModel:
    """The finetune's architecture with the base's weights where they are packed or equal."""
    whole = {name for name in raw if name.removesuffix("_mask").removesuffix("_scale") == name}
    own = whole - {f"{module}.weight" for module in packed}
    state = {name: raw[name] if name in own else base[name] for name in sorted({*base, *own})}
    dtype = next(iter(state.values())).dtype
    model = AutoModelForCausalLM.from_config(_plain(config), dtype=dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise InputError(
            f"expected the weights of {type(model).__name__}, but "
            f"{[*unexpected, *sorted(set(missing) - tied)][0]} is missing or has no place"
        )
    return model


def _plain(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a dense model that is no task vector."""
    plain = copy.deepcopy(config)
    delattr(plain, "quantization_config")
    delattr(plain, SECTION)
    return plain


def merge_delta(folder: str | Path, out: str | Path, base: str | Path | None = None) -> None:
    """Write base plus differences as a stock dense checkpoint to the new folder `out`."""
    vector = TaskVector(folder, base)
    config = _plain(vector.config)
    with new_folder(Path(out)) as scratch:
        write_weights(scratch, vector.tensors())
        config.save_pretrained(scratch)
        copy_companions(vector.raw.folder, scratch)
