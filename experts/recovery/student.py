"""A packed checkpoint opened for training: a stock dense model, and the mask of each matrix.

O out features, I in features, N kept values of a matrix, in row-major order.
"""

import copy
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from moiety.errors import InputError
from moiety.experts import packing
from moiety.experts.architecture import Architecture
from moiety.experts.companions import copy_companions
from moiety.experts.delta import base_of
from moiety.experts.kernels.reference import unpack_bits
from moiety.experts.pattern import Pattern
from moiety.experts.preflight import load_tokenizer
from moiety.experts.shards import write_weights
from moiety.experts.unpack import DenseView, dense_view
from moiety.files import write_json

REPORT = "recovery.json"
KEPT_FILES = ("config.json", "pruning.json")


@dataclass(frozen=True)
class Matrix:
    """One packed matrix: its tensor's name, what it keeps and in which dtype."""

    name: str
    mask_OI: Tensor
    pattern: Pattern
    stored: torch.dtype


@dataclass(frozen=True)
class Student:
    """A packed model as a dense one in fp32; `matrices` are the packed ones by module name."""

    view: DenseView
    network: PreTrainedModel
    tokenizer: Tokenizer
    matrices: dict[str, Matrix]

    @property
    def folder(self) -> Path:
        """Where the packed model is."""
        return self.view.raw.folder

    def linear(self, module: str) -> nn.Linear:
        """The layer of a packed matrix."""
        layer = self.network.get_submodule(module)
        assert isinstance(layer, nn.Linear)
        return layer

    def write(
        self, folder: Path, values: Mapping[str, Tensor], others: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the packed model into `folder` with new kept values (N,), by module name.

        `others` replaces whole tensors that are not packed. Masks, dtypes and everything else are
        taken over byte for byte. Raises InputError for values that are not finite.
        """
        write_weights(folder, self._tensors(values, others or {}))
        copy_companions(self.folder, folder)
        for name in KEPT_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def _tensors(
        self, values: Mapping[str, Tensor], others: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        raw = self.view.raw
        module_of = {matrix.name: module for module, matrix in self.matrices.items()}
        for name in raw:
            before = raw[name]
            if (module := module_of.get(name)) in values:
                assert module is not None
                mask_OB, width = raw[f"{name}_mask"], self.matrices[module].mask_OI.shape[1]
                after = values[module].detach().cpu().to(before.dtype).reshape(before.shape)
                packing.check(name, after, mask_OB, width, self.matrices[module].pattern)
                yield name, after
            elif name in others:
                after = others[name].detach().cpu().to(before.dtype)
                if after.shape != before.shape or not bool(after.isfinite().all()):
                    raise InputError(f"{name}: expected finite values of its own shape")
                yield name, after
            else:
                yield name, before


def open_student(sparse: str | Path) -> Student:
    """Open a packed model (folder or hub id) with floating-point values, every dropout off.

    Raises InputError when it is dense, holds integer values, is a composite, or is incomplete.
    """
    view = dense_view(sparse)
    if base_of(view.config) is not None:
        raise InputError(
            f"expected whole weights in {view.raw.folder}, but it is a task vector; prune the "
            "finetune itself to recover it"
        )
    if view.packing is None or not view.packed:
        raise InputError(
            f"expected a packed model in {view.raw.folder}, but it is dense; prune it first"
        )
    if view.packing.values in packing.LARGEST_CODE:
        raise InputError(
            f"expected floating-point values in {view.raw.folder}, but they are {view.packing.values}, "
            "which training would move off their grid; recover a model with bf16 values, then "
            f"store it as {view.packing.values}"
        )
    network = _dense_network(view)
    matrices = {module: matrix for module, matrix in _matrices(view, network)}
    return Student(view, network, load_tokenizer(view.raw.folder), matrices)


def _matrices(view: DenseView, network: PreTrainedModel) -> Iterator[tuple[str, Matrix]]:
    modules = dict(network.named_modules())
    for name, pattern in view.packed.items():
        module = name.removesuffix(".weight")
        layer = modules.get(module)
        if not isinstance(layer, nn.Linear):
            raise InputError(
                f"expected a pruned finetune, whose packed matrices are linear layers, but {name} "
                f"in {view.raw.folder} is none; recover each finetune before composing them"
            )
        mask_OI = unpack_bits(view.raw[f"{name}_mask"], layer.in_features)
        yield module, Matrix(name, mask_OI.bool(), pattern, view.raw[name].dtype)


def _dense_network(view: DenseView) -> PreTrainedModel:
    config = without_dropout(view.config)
    architecture: Any = type(Architecture(config).model)
    network, info = architecture.from_pretrained(
        None, config=config, state_dict=dict(view), dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"expected every weight in {view.raw.folder}, but {len(missing)} are missing, "
            f"first {missing[0]}; the files are incomplete"
        )
    return network.eval()


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration in which nothing is dropped at random, so that runs repeat exactly."""
    config = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def write_report(folder: Path, report: Mapping[str, object]) -> None:
    """Write `recovery.json`."""
    write_json(folder / REPORT, dict(report))
