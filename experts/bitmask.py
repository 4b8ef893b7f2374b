"""The sparse formats that compressed-tensors wrote up to 0.12 and that it no longer reads.

A matrix (O, I) called `X.weight` is stored as `X.shape` (2,) or (2, 1) int64, `X.compressed` and
`X.bitmask` (O, ceil(I/8)) uint8, lowest bit first. In `sparse-24-bitmask` the values are
(O, I/2), exactly two in each four columns; in `sparse-bitmask` they are flat and `X.row_offsets`
(O,) int64 says where each row begins. Up to 0.6 the latter kept the whole name (`X.weight.shape`)
and took every tensor, vectors too. O/I out/in features, B mask bytes a row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.experts import packing
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.kernels import reference
from moiety.experts.pattern import Pattern
from moiety.files import read_json

TWO_FOUR, UNSTRUCTURED = "sparse-24-bitmask", "sparse-bitmask"
PARTS = {
    TWO_FOUR: ("shape", "compressed", "bitmask"),
    UNSTRUCTURED: ("shape", "compressed", "bitmask", "row_offsets"),
}
SECTIONS = ("quantization_config", "compression_config")
SPARSITY = "sparsity_config"


class OldCheckpoint:
    """A checkpoint in one of the old formats.

    `stems` maps the names of compressed weights to what their parts' names begin with, `plain`
    are the names of all other tensors. Raises InputError when it is in no such format or parts
    are missing.
    """

    def __init__(self, model: str | Path) -> None:
        self.raw = Checkpoint(model)
        self.fields: dict[str, Any] = read_json(self.raw.folder / "config.json")
        if not isinstance(self.fields, dict):
            raise InputError(
                f"expected a model's fields in {self.raw.folder / 'config.json'}, but it holds "
                f"{type(self.fields).__name__}; the file is damaged"
            )
        self.format = sparsity_format(self.fields)
        self.headers = self.raw.shapes()
        stems = [n.removesuffix(".compressed") for n in self.raw if n.endswith(".compressed")]
        self.stems = {f"{stem.removesuffix('.weight')}.weight": stem for stem in stems}
        parts = {f"{stem}.{part}" for stem in stems for part in PARTS[self.format]}
        missing = sorted(parts - set(self.raw))
        if missing or not stems:
            raise InputError(
                f"expected tensor {missing[0] if missing else '*.compressed'} in "
                f"{self.raw.folder}, as format {self.format} has it, but it is missing"
            )
        self.plain = [name for name in self.raw if name not in parts]

    def kept(self, name: str) -> int:
        """How many values of a compressed weight are stored, from the file's header."""
        return torch.Size(self.headers[f"{self.stems[name]}.compressed"][0]).numel()

    def read(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The values (O, I/2) or flat and the mask (O, B) of a compressed weight.

        A vector counts as one row. Everything is checked against `shape`, the format's rules and
        itself; InputError names the tensor.
        """
        stem = self.stems[name]
        stated, values, mask_OB = (self.raw[f"{stem}.{part}"] for part in PARTS[TWO_FOUR])
        if tuple(stated.flatten().tolist()) != shape:
            raise InputError(
                f"{stem}.shape: expected {shape}, as the configuration says, "
                f"but it is {tuple(stated.flatten().tolist())}"
            )
        mask_OB = mask_OB.reshape(-1, mask_OB.shape[-1])
        if self.format == TWO_FOUR:
            packing.check(f"{stem}.compressed", values, mask_OB, shape[-1], Pattern(2, 4))
        else:
            _check_unstructured(stem, values, mask_OB, self.raw[f"{stem}.row_offsets"], shape)
        return values, mask_OB

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A compressed weight, dense."""
        values, mask_OB = self.read(name, shape)
        return reference.expand(values, mask_OB, shape[-1]).reshape(shape)


def _check_unstructured(
    stem: str, values: Tensor, mask_OB: Tensor, offsets_O: Tensor, shape: tuple[int, ...]
) -> None:
    rows, columns = torch.Size(shape[:-1]).numel(), shape[-1]
    if values.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputError(
            f"{stem}.compressed: expected bf16, fp16 or fp32, but it is {values.dtype}"
        )
    if mask_OB.dtype != torch.uint8 or tuple(mask_OB.shape) != (rows, -(-columns // 8)):
        raise InputError(
            f"{stem}.bitmask: expected uint8 of shape {(rows, -(-columns // 8))}, "
            f"but it is {mask_OB.dtype} of shape {tuple(mask_OB.shape)}"
        )
    bits_OI = reference.unpack_bits(mask_OB, mask_OB.shape[-1] * 8)
    counts_O = bits_OI[:, :columns].sum(-1)
    if bool(bits_OI[:, columns:].any()) or tuple(values.shape) != (int(counts_O.sum()),):
        raise InputError(
            f"{stem}.bitmask: expected one bit for each of the {values.numel()} values, "
            f"but it has {int(bits_OI.sum())}; the file is damaged"
        )
    if offsets_O.flatten().tolist() != (counts_O.cumsum(0) - counts_O).tolist():
        raise InputError(f"{stem}.row_offsets: expected the running sum of its bitmask's bits")
    if not bool(values.isfinite().all()):
        raise InputError(f"{stem}.compressed: expected finite values, but some are not")


def sparsity_format(fields: Mapping[str, Any]) -> str:
    """The old format that a config.json names; InputError says why it is none we can read."""
    sections = [fields[name] for name in SECTIONS if isinstance(fields.get(name), dict)]
    section = sections[0] if sections else fields
    stated = section.get(SPARSITY) or {}
    quantised = section.get("format") if sections else None
    if section.get("quant_method") == "moiety":
        raise InputError(
            "expected an old sparse checkpoint, but this one is packed by moiety; it opens as it "
            "is, through AutoModelForCausalLM after `import moiety`"
        )
    if section.get("config_groups") or quantised not in (None, "dense", *PARTS):
        raise InputError(
            f"expected a sparse checkpoint with whole weights, but this one is also quantised "
            f"(format {quantised or 'of its config_groups'}); give the sparse model before it was "
            "quantised"
        )
    if stated.get("format") == "dense":
        raise InputError(
            "expected compressed weights, but sparsity_config says that they are stored dense; "
            "remove quantization_config from config.json to open this model as it is"
        )
    if stated.get("format") not in PARTS:
        raise InputError(
            f"expected a sparsity_config of format {' or '.join(PARTS)} in config.json, "
            f"but it has {stated.get('format') or 'none'}; a dense model is made sparse by "
            "moiety prune"
        )
    return stated["format"]


def without_compression(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's fields that say nothing of the old formats."""
    return {name: value for name, value in fields.items() if name not in (*SECTIONS, SPARSITY)}
