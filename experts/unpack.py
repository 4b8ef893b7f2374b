"""Read any checkpoint, dense or packed, as plain names and dense tensors."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from moiety.errors import InputError
from moiety.experts import packing
from moiety.experts.architecture import Architecture, dense_config
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.kernels import reference
from moiety.experts.pattern import Pattern
from moiety.experts.quantizer import PackedConfig

OWN_TYPES = "moiety_"
"""What the model types of composites in our own classes start with."""


class DenseView(Mapping[str, Tensor]):
    """The dense tensors of a checkpoint folder by their stock names, each made when asked for.

    Masks and scales are hidden. Packed matrices are checked before they are expanded; they come
    in the dtype of their values, integer ones in fp32.
    """

    def __init__(self, raw: Checkpoint) -> None:
        self.raw = raw
        self.packing = PackedConfig.of(raw.config)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.packed: dict[str, Pattern] = {}
        if self.packing is not None:
            self._find_packed(self.packing)
        hidden = {f"{name}{suffix}" for name in self.packed for suffix in ("_mask", "_scale")}
        self._names = dict.fromkeys(name for name in raw if name not in hidden)

    def _find_packed(self, packed: PackedConfig) -> None:
        if str(self.raw.config.model_type).startswith(OWN_TYPES):
            raise InputError(
                f"expected a model with a stock layout, but {self.raw.folder} is of kind "
                f"{self.raw.config.model_type}; take the experts it was made of (build.json names "
                "them), or one of it with `moiety export --expert`"
            )
        architecture = Architecture(self.raw.config)
        for module in packed.modules:
            for name, shape in architecture.matrices(module).items():
                self._shapes[name] = shape
                self.packed[name] = packed.pattern_of(module)
        self._check_names(packed)

    def _check_names(self, packed: PackedConfig) -> None:
        suffixes = ["", "_mask"] + (["_scale"] if packed.values in packing.LARGEST_CODE else [])
        needed = {f"{name}{suffix}" for name in self.packed for suffix in suffixes}
        missing = sorted(needed - set(self.raw))
        masks = {f"{name}_mask" for name in self.raw} & set(self.raw)
        strange = sorted(masks - needed)
        if missing:
            raise InputError(
                f"expected tensor {missing[0]} in {self.folder}, as its quantization_config says, "
                "but it is missing; the files are incomplete"
            )
        if strange:
            raise InputError(
                f"expected no tensor {strange[0]} in {self.folder}, because its "
                "quantization_config does not name that module; the configuration is damaged"
            )

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return self.raw.folder

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """The configuration of the dense model."""
        return dense_config(self.raw.config)

    def __getitem__(self, name: str) -> Tensor:
        """One dense tensor; InputError names it when it is damaged."""
        if name not in self.packed:
            if name not in self._names:
                raise KeyError(name)
            return self.raw[name]
        assert self.packing is not None
        *rows, width = self._shapes[name]
        values, mask = self.raw[name], self.raw[f"{name}_mask"]
        scale = self.raw[f"{name}_scale"] if f"{name}_scale" in self.raw.files else None
        kind = self.packing.values
        packing.check(name, values, mask, width, self.packed[name], scale, kind)
        if list(mask.shape[:-1]) != rows:
            raise InputError(
                f"{name}: expected {rows} rows, as the configuration says, "
                f"but its mask has {list(mask.shape[:-1])}"
            )
        return reference.expand(values, mask, width, scale)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def dense_view(model: str | Path) -> DenseView:
    """The dense tensors of a model folder (or hub id), whether it is dense or packed.

    Raises InputError when there is no model, it is quantized in another way, or a packed matrix
    has no mask.
    """
    return DenseView(Checkpoint(model))
