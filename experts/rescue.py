"""Turn checkpoints in compressed-tensors' old sparse formats into packed ones.

transformers opens such a checkpoint without an error and fills every sparse layer with random
numbers, because nothing reads the formats any more; here nothing is taken on trust.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moiety.errors import InputError
from moiety.experts.architecture import Architecture, Shapes
from moiety.experts.bitmask import TWO_FOUR, OldCheckpoint, without_compression
from moiety.experts.companions import copy_companions
from moiety.experts.packing import DTYPES, Packed, pack
from moiety.experts.pattern import Pattern
from moiety.experts.quantizer import PackedConfig
from moiety.experts.shards import write_weights
from moiety.files import check_new_folder, new_folder, write_json
from moiety.progress import SILENT, Progress

HEADER_KINDS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True, kw_only=True)
class RescueReport:
    """What was rescued: the old format, the packed matrices, zeros that had to be added to them.

    Zeros are added to unstructured matrices only, because a density keeps a whole number of
    weights a row on average and the experts of a layer share one.
    """

    folder: Path
    format: str
    matrices: int
    added_zeros: int


def rescue(old_folder: str | Path, out: str | Path, progress: Progress = SILENT) -> RescueReport:
    """Write an old `sparse-24-bitmask` or `sparse-bitmask` checkpoint (folder or hub id) packed.

    Every tensor is checked against the architecture, the format's rules and the configuration.
    2:4 matrices keep their bytes; an unstructured one gets the lowest density that holds its
    values. Raises InputError that names the tensor when something is missing, unexpected or
    damaged, or the checkpoint is quantised too; OutputError when `out` cannot be made.
    """
    out = Path(out)
    check_new_folder(out)
    old = OldCheckpoint(old_folder)
    job = _Rescue(old, Architecture(old.raw.config))
    with new_folder(out) as scratch:
        write_weights(scratch, job.tensors(progress))
        fields = without_compression(old.fields)
        write_json(scratch / "config.json", {**fields, "quantization_config": job.config.to_dict()})
        copy_companions(old.raw.folder, scratch)
    return RescueReport(
        folder=out, format=old.format, matrices=len(job.patterns), added_zeros=job.added_zeros
    )


class _Rescue:
    """One old checkpoint: what becomes of each of its tensors."""

    def __init__(self, old: OldCheckpoint, architecture: Architecture) -> None:
        self.old = old
        self.shapes = architecture.shapes
        self.added_zeros = 0
        self._check_names(architecture.tied)
        modules: dict[str, Pattern] = {}
        self.patterns: dict[str, Pattern] = {}
        for module in architecture.packable:
            matrices = architecture.matrices(module)
            pattern = _pattern(old, module, matrices)
            if pattern is not None and not pattern.is_dense:
                modules[module] = pattern
                self.patterns.update(dict.fromkeys(matrices, pattern))
        self.config = _config(modules, self._kind())

    def _check_names(self, tied: set[str]) -> None:
        names = {*self.old.plain, *self.old.stems}
        missing = sorted(set(self.shapes) - names)
        strange = sorted(names - set(self.shapes) - (tied - set(self.old.stems)))
        if missing or strange:
            which = f"{missing[0]} is missing" if missing else f"{strange[0]} has no place in it"
            raise InputError(
                f"expected the weights of {self.old.fields.get('model_type')}, but {which}"
            )
        for name in self.old.plain:
            found, _ = self.old.headers[name]
            if name in self.shapes and found != self.shapes[name]:
                raise InputError(
                    f"{name}: expected shape {self.shapes[name]}, as the configuration says, "
                    f"but it is {found}"
                )

    def _kind(self) -> str | None:
        """The one type of all packed values, None when they differ."""
        stems = [self.old.stems[name] for name in self.patterns]
        types = {self.old.headers[f"{stem}.compressed"][1] for stem in stems}
        return HEADER_KINDS.get(next(iter(types))) if len(types) == 1 else None

    def tensors(self, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the packed checkpoint."""
        for name in progress.track(sorted(self.shapes), "read tensors", len(self.shapes)):
            if name not in self.old.stems:
                yield name, self.old.raw[name]
            elif name in self.patterns:
                yield from self._packed(name).tensors(name).items()
            else:
                yield name, self.old.dense(name, self.shapes[name])

    def _packed(self, name: str) -> Packed:
        shape = self.shapes[name]
        if self.old.format == TWO_FOUR:
            return Packed(*self.old.read(name, shape), None, *shape)
        dense = self.old.dense(name, shape)
        kind = next(kind for kind, dtype in DTYPES.items() if dtype == dense.dtype)
        packed = pack(dense, self.patterns[name], kind)
        self.added_zeros += packed.values.numel() - self.old.kept(name)
        return packed


def _pattern(old: OldCheckpoint, module: str, matrices: Shapes) -> Pattern | None:
    """The pattern that holds all matrices of one module, None when they are stored dense."""
    compressed = [name for name in matrices if name in old.stems]
    if not compressed:
        return None
    if len(compressed) < len(matrices):
        absent = sorted(set(matrices) - set(compressed))
        raise InputError(
            f"expected all matrices of {module} compressed or none, but {compressed[0]} is and "
            f"{absent[0]} is not"
        )
    if old.format == TWO_FOUR:
        return Pattern(2, 4)
    shares = [-(-old.kept(name) // rows) / width for name, (rows, width) in matrices.items()]
    least = 1 / max(width for _, width in matrices.values())
    return Pattern.parse(str(Pattern.unstructured(min(1.0, max(least, *shares)))))


def _config(modules: Mapping[str, Pattern], kind: str | None) -> PackedConfig:
    if not modules:
        raise InputError("expected sparse weights, but every compressed one is full")
    texts = {module: str(pattern) for module, pattern in modules.items()}
    [(usual, _)] = Counter(texts.values()).most_common(1)
    own = {module: text for module, text in texts.items() if text != usual}
    return PackedConfig(pattern=usual, modules=sorted(modules), values=kind, patterns=own)
