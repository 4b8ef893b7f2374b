"""Width pruning: drop whole FFN neurons, so that a smaller dense model of the stock kind is left.

D model width, F neurons, S of them kept, O/I out/in features.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from moiety.errors import InputError
from moiety.experts.calibrate import BlockBatch, GramCollector, advance
from moiety.experts.companions import copy_companions
from moiety.experts.ffn import FeedForward, find_ffn, width_field
from moiety.experts.neurons import column_error, keep_neurons, refit_columns
from moiety.experts.preflight import check_vocabulary, load_tokenizer
from moiety.experts.shards import write_weights
from moiety.experts.stream import StreamedModel
from moiety.experts.unpack import DenseView, dense_view
from moiety.files import check_new_folder, new_folder, write_json
from moiety.progress import SILENT, Progress
from moiety.text import Windows, read_documents, token_windows

REPORT = "width.json"
SLICE_TOLERANCE = 1e-3


def removable(weight_OI: Tensor) -> tuple[int, int]:
    """How many rows and columns of a matrix are all zero, so that a smaller one could hold it.

    N:M and unstructured patterns leave almost none: dropping neurons is another method.
    """
    nonzero_OI = weight_OI != 0
    return int((~nonzero_OI.any(1)).sum()), int((~nonzero_OI.any(0)).sum())


@dataclass(frozen=True, kw_only=True)
class WidthSettings:
    """How to prune the width.

    Every block keeps the same share `keep` of its FFN neurons, rounded to a multiple of
    `multiple` (what fast kernels and tensor parallelism want); `refit` then solves the last
    matrix by least squares with `damping` of the Gram matrix's mean diagonal. Calibration takes
    `windows` windows of `context_length` tokens.
    """

    keep: float = 0.75
    multiple: int = 8
    refit: bool = True
    damping: float = 0.01
    context_length: int = 512
    windows: int = 128
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(f"keep must be above 0 and at most 1, but it is {self.keep}")
        if not self.damping > 0:
            raise InputError(f"damping must be positive, but it is {self.damping}")
        for name in ("multiple", "windows", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")

    def kept(self, width: int) -> int:
        """How many of `width` neurons stay."""
        rounded = max(1, round(self.keep * width / self.multiple)) * self.multiple
        return width if self.keep == 1 else min(width, rounded)


@dataclass(frozen=True, kw_only=True)
class BlockWidth:
    """One block: relative error of its FFN's output on calibration text, unmended and written."""

    error_cut: float
    error_after: float


@dataclass(frozen=True, kw_only=True)
class WidthReport:
    """What width pruning did; also `width.json` beside the weights.

    `config_field` is the configuration's name for the width; parameters count the whole model.
    """

    settings: WidthSettings
    config_field: str
    width_before: int
    width_after: int
    parameters_before: int
    parameters_after: int
    calibration_tokens: int
    seconds: float
    blocks: list[BlockWidth] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        return asdict(self)


def prune_width(
    model: str | Path,
    out: str | Path,
    data: str | Path | Sequence[str],
    settings: WidthSettings | None = None,
    progress: Progress = SILENT,
) -> WidthReport:
    """Drop FFN neurons of a dense model (folder or hub id); write a smaller stock model to `out`.

    `data` is a corpus file or folder, or a list of documents, of the model's own domain. Block
    by block: each is calibrated on what the smaller blocks before it put out. Gated, fused and
    plain FFNs of linear layers are found by their structure. Raises InputError for a packed
    model or another kind of FFN, OutputError when `out` is not free.
    """
    settings = settings or WidthSettings()
    started = time.perf_counter()
    out = Path(out)
    check_new_folder(out)
    documents = read_documents(data) if isinstance(data, str | Path) else list(data)
    view = dense_view(model)
    if view.packed:
        raise InputError(
            f"expected a dense model, but {view.folder} is packed; prune the width of the dense "
            "one first and remove weights after"
        )
    tokenizer = load_tokenizer(view.folder)
    windows = token_windows(tokenizer, documents, settings.context_length, settings.windows)
    check_vocabulary(windows, view.config, view.folder)
    pruner = _WidthPruner(view, settings)
    with new_folder(out) as scratch:
        write_weights(scratch, pruner.tensors(windows, progress))
        pruner.smaller_config().save_pretrained(scratch)
        copy_companions(view.folder, scratch)
        report = pruner.report(windows, time.perf_counter() - started)
        write_json(scratch / REPORT, report.to_dict())
    return report


class _WidthPruner:
    """One model on its way to fewer neurons."""

    def __init__(self, view: DenseView, settings: WidthSettings) -> None:
        self.view, self.settings = view, settings
        self.field = width_field(view.config)
        self.before: int = getattr(view.config.get_text_config(), self.field)
        self.after = settings.kept(self.before)
        if self.after == self.before and settings.keep < 1:
            raise InputError(
                f"expected fewer than {self.before} neurons to stay, but {settings.keep:g} of them, "
                f"rounded to a multiple of {settings.multiple}, is all; lower keep or multiple"
            )
        self.stream = StreamedModel(view.config, view)
        self.ffns = [
            find_ffn(block, self.before, self.stream.name(index, "").rstrip("."))
            for index, block in enumerate(self.stream.blocks)
        ]
        self.blocks: list[BlockWidth] = []
        self.parameters = [0, 0]

    def smaller_config(self) -> PretrainedConfig:
        """The configuration with the new width."""
        config = copy.deepcopy(self.view.config)
        setattr(config.get_text_config(), self.field, self.after)
        return config

    def report(self, windows: Windows, seconds: float) -> WidthReport:
        """What was done."""
        return WidthReport(
            settings=self.settings,
            config_field=self.field,
            width_before=self.before,
            width_after=self.after,
            parameters_before=self.parameters[0],
            parameters_after=self.parameters[1],
            calibration_tokens=int(windows.mask_WC.sum()),
            seconds=seconds,
            blocks=self.blocks,
        )

    @torch.no_grad()
    def tensors(self, windows: Windows, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the smaller model, block by block as they are made."""
        base = f"{self.stream.model.base_model_prefix}."
        stems = [
            self.stream.name(index, "").removeprefix(base) for index in range(len(self.stream))
        ]
        rest = dict.fromkeys(self.view)
        batches = self.stream.capture(windows, self.settings.batch_size)
        for index in progress.track(range(len(stems)), "prune width", len(stems)):
            new = self._block(index, batches)
            for name in [one for one in rest if one.removeprefix(base).startswith(stems[index])]:
                del rest[name]
                inner = name.removeprefix(base).removeprefix(stems[index])
                yield name, self._counted(self.view[name], new.get(inner))
        for name in rest:
            yield name, self._counted(self.view[name], None)

    def _counted(self, old: Tensor, new: Tensor | None) -> Tensor:
        tensor = old if new is None else new.to(old.dtype)
        self.parameters[0] += old.numel()
        self.parameters[1] += tensor.numel()
        return tensor

    def _block(self, index: int, batches: list[BlockBatch]) -> dict[str, Tensor]:
        """New tensors of a block by their names within it; the batches go on to the next one."""
        settings, ffn = self.settings, self.ffns[index]
        self.stream.enter(index, batches)
        with self.stream.block(index) as block:
            if self.after == self.before:
                self.blocks.append(BlockWidth(error_cut=0.0, error_after=0.0))
                advance(block, batches)
                return {}
            down = block.get_submodule(ffn.down)
            assert isinstance(down, nn.Linear)
            gram_FF = GramCollector({"down": down}).run(block, batches)["down"]
            down_DF = down.weight.detach().clone()
            kept_S = keep_neurons(down_DF, gram_FF, self.after)
            cut_DS = down_DF[:, kept_S]
            after_DS = cut_DS
            if settings.refit:
                after_DS = refit_columns(down_DF, gram_FF, kept_S, settings.damping)
            self.blocks.append(
                BlockWidth(
                    error_cut=column_error(down_DF, cut_DS, gram_FF, kept_S),
                    error_after=column_error(down_DF, after_DS, gram_FF, kept_S),
                )
            )
            if index == 0:
                _check_cut(block, ffn, kept_S, batches[0])
            new = ffn.cut(block, kept_S, after_DS)
            advance(block, batches)
        return new


def _check_cut(block: nn.Module, ffn: FeedForward, kept_S: Tensor, batch: BlockBatch) -> None:
    """Raise InputError unless cutting neurons out is the same as not reading them."""
    smaller = copy.deepcopy(block)
    down = block.get_submodule(ffn.down)
    weight_DF = down.get_parameter("weight")
    kept_DF = weight_DF.detach().clone()
    unread_DF = torch.zeros_like(kept_DF)
    unread_DF[:, kept_S] = kept_DF[:, kept_S]
    try:
        weight_DF.data = unread_DF
        expected_WCD = batch.run(block)
        ffn.cut(smaller, kept_S, kept_DF[:, kept_S])
        same = torch.allclose(batch.run(smaller), expected_WCD, SLICE_TOLERANCE, SLICE_TOLERANCE)
    except RuntimeError:
        same = False
    finally:
        weight_DF.data = kept_DF
    if not same:
        raise InputError(
            "expected the FFN to work neuron by neuron, but without some of them the others put "
            "out something else (a norm between its matrices does that); remove weights instead"
        )
