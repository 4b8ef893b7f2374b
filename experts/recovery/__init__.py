"""Recovery: training after pruning with the masks fixed, so that sparsity stays as it is."""

from collections.abc import Sequence
from pathlib import Path

from moiety.errors import InputError
from moiety.experts.recovery.block import BlockRecovery, BlockReport, reconstruct
from moiety.experts.recovery.settings import (
    DistillSettings,
    LoraSettings,
    RecoveryReport,
    RecoverySettings,
)
from moiety.progress import SILENT, Progress

__all__ = [
    "METHODS",
    "BlockRecovery",
    "BlockReport",
    "DistillSettings",
    "LoraSettings",
    "RecoveryReport",
    "RecoverySettings",
    "reconstruct",
    "recover",
]

METHODS: dict[str, type[RecoverySettings]] = {"distill": DistillSettings, "lora": LoraSettings}


def recover(
    sparse: str | Path,
    teacher: str | Path,
    data: str | Path | Sequence[str],
    out: str | Path,
    method: str = "distill",
    settings: RecoverySettings | None = None,
    progress: Progress = SILENT,
) -> RecoveryReport:
    """Train a packed model towards its dense finetune and write a packed one with the same masks.

    `sparse` and `teacher` are folders or hub ids, `data` a corpus file or folder or a list of
    documents. `method` `distill` trains the kept values themselves, `lora` a low-rank change of
    them; `settings` are a DistillSettings or LoraSettings. Raises InputError or OutputError
    before any long work when something does not fit.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, but it is {method!r}")
    settings = METHODS[method]() if settings is None else settings
    if not isinstance(settings, METHODS[method]):
        raise InputError(
            f"settings for method {method} must be {METHODS[method].__name__}, "
            f"but they are {type(settings).__name__}"
        )
    if isinstance(settings, LoraSettings):
        from moiety.experts.recovery.lora import lora

        return lora(sparse, teacher, data, out, settings, progress)
    from moiety.experts.recovery.distill import distill

    assert isinstance(settings, DistillSettings)
    return distill(sparse, teacher, data, out, settings, progress)
