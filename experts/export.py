"""Write a packed model as the stock dense checkpoint that any other engine reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.experts.companions import copy_companions
from moiety.experts.delta import base_of
from moiety.experts.packing import DTYPES, FLOATS, LARGEST_CODE
from moiety.experts.shards import SHARD_BYTES, write_weights
from moiety.experts.unpack import DenseView, dense_view
from moiety.files import check_new_folder, new_folder, read_json, write_json
from moiety.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written: its folder, the matrices that were unpacked, bytes before and after."""

    folder: Path
    matrices: int
    packed_bytes: int
    dense_bytes: int


def export_dense(
    model: str | Path,
    out: str | Path,
    dtype: torch.dtype | str | None = None,
    progress: Progress = SILENT,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Write a packed model (folder or hub id) dense, in its architecture's canonical names.

    Packed matrices are written in the model's dtype, the rest as it is; `dtype` (bf16, fp16,
    fp32) converts everything. The packed model computes with the same rounded matrices, but
    integer values times their scales are exact only in fp32. One shard at a time is in memory.
    Raises InputError when the model is not packed, a tensor is damaged or too large for fp16,
    and OutputError when `out` cannot be made.
    """
    out, wanted = Path(out), _dtype(dtype)
    check_new_folder(out)
    view = dense_view(model)
    if view.packing is None:
        raise InputError(f"expected a packed model in {view.folder}, but it is dense already")
    if base_of(view.config) is not None:
        raise InputError(
            f"expected whole weights in {view.folder}, but it holds differences to a base; write "
            "base and differences with moiety.experts.delta.merge_delta"
        )
    unpacked = wanted or getattr(view.config, "dtype", None) or torch.float32
    if view.packing.values in LARGEST_CODE and unpacked != torch.float32:
        progress.note(
            f"{view.packing.values} values times their scales are rounded to {_name(unpacked)}; "
            "fp32 keeps them exact"
        )
    with new_folder(out) as scratch:
        tensors = _tensors(view, unpacked, wanted, progress)
        write_weights(scratch, tensors, shard_bytes)
        _write_config(view.folder, scratch, wanted)
        copy_companions(view.folder, scratch)
    return ExportReport(
        folder=out,
        matrices=len(view.packed),
        packed_bytes=_weight_bytes(view.folder),
        dense_bytes=_weight_bytes(out),
    )


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    floats = {kind: DTYPES[kind] for kind in FLOATS}
    known = {None: None, **floats, **{dtype: dtype for dtype in floats.values()}}
    if dtype not in known:
        raise InputError(f"dtype must be one of {', '.join(FLOATS)}, but it is {dtype}")
    return known[dtype]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(
    view: DenseView, unpacked: torch.dtype, others: torch.dtype | None, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    for name in progress.track(view, "write tensors", len(view)):
        tensor = view[name]
        dtype = unpacked if name in view.packed else others
        if dtype is None or not tensor.is_floating_point():
            yield name, tensor
            continue
        converted = tensor.to(dtype)
        if not bool(converted.isfinite().all()):
            raise InputError(
                f"{name}: expected values within the range of {_name(dtype)}, but some are "
                "beyond it; choose bf16 or fp32"
            )
        yield name, converted


def _write_config(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    fields = read_json(source / "config.json")
    del fields["quantization_config"]
    if str((fields.get("auto_map") or {}).get("AutoConfig", "")).startswith("moiety_shim."):
        del fields["auto_map"]
    if dtype is not None:
        fields.pop("torch_dtype", None)
        fields["dtype"] = _name(dtype)
    write_json(target / "config.json", fields)
