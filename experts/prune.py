"""Prune one finetune: calibrate, prune and refit block by block, write a packed model."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moiety.errors import InputError
from moiety.experts import calibrate
from moiety.experts.checkpoint import local_folder
from moiety.experts.methods import METHODS, refit, relative_error
from moiety.experts.modules import SparseLinear
from moiety.experts.packing import VALUE_DTYPES, Packed, pack
from moiety.experts.pattern import Pattern
from moiety.experts.quantizer import PackedConfig, PackedQuantizer
from moiety.files import check_new_folder, new_folder, write_json
from moiety.progress import SILENT, Progress
from moiety.text import Windows, read_documents, token_windows

SITES = ("ffn", "attention", "all")


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """How to prune: pattern, which linear layers, method, refit and calibration size.

    `refit_steps` conjugate-gradient steps follow the method (0: none); `windows` calibration
    windows of `context_length` tokens; kept values are stored as `values`.
    """

    pattern: str = "2:4"
    sites: str = "ffn"
    method: str = "sparsegpt"
    refit_steps: int = 20
    context_length: int = 512
    windows: int = 128
    batch_size: int = 8
    values: str = "bf16"

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        for name, allowed in (("sites", SITES), ("method", METHODS), ("values", VALUE_DTYPES)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} must be one of {', '.join(allowed)}, but it is {getattr(self, name)!r}"
                )
        for name, least in (("refit_steps", 0), ("windows", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{name} must be at least {least}, but it is {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """One pruned matrix: relative output error on calibration text before and after the refit."""

    name: str
    shape: tuple[int, int]
    error_after_method: float
    error_after_refit: float


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What pruning did; also written to `pruning.json` beside the weights."""

    settings: PruneSettings
    calibration_tokens: int
    dense_bytes: int
    packed_bytes: int
    seconds: float
    matrices: list[MatrixReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-like form."""
        return asdict(self)


def prune(
    model: str | Path,
    out: str | Path,
    data: str | Path | Sequence[str],
    settings: PruneSettings | None = None,
    progress: Progress = SILENT,
) -> PruneReport:
    """Prune a model (folder or hub id) on its own domain's text and write a packed one to `out`.

    `data` is a corpus file or folder, or a list of documents. The result opens through
    `AutoModelForCausalLM.from_pretrained` after `import moiety`. Raises InputError or
    OutputError before any long work when something does not fit.
    """
    settings = settings or PruneSettings()
    out = Path(out)
    check_new_folder(out)
    documents = read_documents(data) if isinstance(data, str | Path) else list(data)
    folder = local_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = token_windows(tokenizer, documents, settings.context_length, settings.windows)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    report = prune_model(network, windows, settings, progress)
    with new_folder(out) as scratch:
        network.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        write_json(scratch / "pruning.json", report.to_dict())
    return report


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    windows: Windows,
    settings: PruneSettings,
    progress: Progress = SILENT,
) -> PruneReport:
    """Prune a model in memory; its chosen linear layers become packed SparseLinear modules.

    Sequential: every block is calibrated on what the pruned blocks before it put out.
    """
    start = time.perf_counter()
    prefix, blocks = calibrate.decoder_blocks(model)
    _check_widths(blocks, settings)
    batches = calibrate.capture(model, windows, settings.batch_size)
    packed: dict[str, Packed] = {}
    matrices: list[MatrixReport] = []
    for index, block in progress.track(enumerate(blocks), "prune blocks", len(blocks)):
        linears = dict(calibrate.linears_of(block, settings.sites))
        grams = calibrate.GramCollector(linears).run(block, batches)
        for name, linear in linears.items():
            full_name = f"{prefix}.{index}.{name}"
            packed[full_name], matrix = _prune_matrix(full_name, linear, grams[name], settings)
            matrices.append(matrix)
        calibrate.advance(block, batches)
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    install_packed(model, packed, settings.pattern)
    return PruneReport(
        settings=settings,
        calibration_tokens=int(windows.mask_WC.sum()),
        dense_bytes=dense_bytes,
        packed_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        seconds=time.perf_counter() - start,
        matrices=matrices,
    )


def _check_widths(blocks: nn.ModuleList, settings: PruneSettings) -> None:
    linears = dict(calibrate.linears_of(blocks[0], settings.sites))
    if not linears:
        raise InputError(f"expected linear layers at sites {settings.sites}, but there are none")
    for linear in linears.values():
        Pattern.parse(settings.pattern).check_width(linear.in_features)


def _prune_matrix(
    name: str, linear: nn.Linear, gram_II: Tensor, settings: PruneSettings
) -> tuple[Packed, MatrixReport]:
    pattern = Pattern.parse(settings.pattern)
    weight_OI = linear.weight.float()
    try:
        pruned_OI = METHODS[settings.method](weight_OI, gram_II, pattern)
        first_error = relative_error(weight_OI, pruned_OI, gram_II)
        if settings.refit_steps:
            pruned_OI = refit(weight_OI, pruned_OI, gram_II, settings.refit_steps)
        packed = pack(pruned_OI, pattern, VALUE_DTYPES[settings.values])
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    stored_OI = packed.dense().float()
    report = MatrixReport(
        name=name,
        shape=(linear.out_features, linear.in_features),
        error_after_method=first_error,
        error_after_refit=relative_error(weight_OI, stored_OI, gram_II),
    )
    linear.weight.copy_(stored_OI)
    return packed, report


def install_packed(model: PreTrainedModel, packed: Mapping[str, Packed], pattern: str) -> None:
    """Replace the named linear layers by packed ones and mark the model as packed for saving."""
    for name, matrix in packed.items():
        parent, _, attribute = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        sparse = SparseLinear(
            linear.in_features,
            linear.out_features,
            Pattern.parse(pattern),
            bias=linear.bias is not None,
            dtype=matrix.values_OK.dtype,
        )
        sparse.weight.data, sparse.weight_mask.data = matrix.values_OK, matrix.mask_OB
        sparse.bias = linear.bias
        setattr(model.get_submodule(parent), attribute, sparse)
    config = PackedConfig(pattern=pattern, modules=sorted(packed))
    quantizer = PackedQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    setattr(model, "hf_quantizer", quantizer)  # noqa: B010
