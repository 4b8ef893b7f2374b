"""Whole-model distillation: train the kept values of a packed model towards its dense finetune."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from moiety.errors import InputError
from moiety.experts.recovery.kept import attach
from moiety.experts.recovery.session import open_session
from moiety.experts.recovery.settings import DistillSettings, RecoveryReport
from moiety.experts.recovery.student import Student
from moiety.progress import SILENT, Progress

SCALE_OF_ZEROS = 0.02
"""Stands in for the root-mean-square of a tensor that is all zero, such as a new bias."""


def distill(
    sparse: str | Path,
    teacher: str | Path,
    data: str | Path | Sequence[str],
    out: str | Path,
    settings: DistillSettings | None = None,
    progress: Progress = SILENT,
) -> RecoveryReport:
    """Distil the dense finetune `teacher` into the packed model `sparse`, masks fixed.

    The removed weights have no parameters at all, so the masks cannot move. Writes a packed
    model to `out` with the masks, patterns and dtypes of `sparse`; its held-back loss is never
    higher. Runs under `accelerate launch`: the windows of a step are spread over the processes.
    With `settings.checkpoint` a stopped run goes on where it was and, in one process, ends in
    the same bytes. Raises InputError or OutputError before any long work.
    """
    settings = settings or DistillSettings()
    session = open_session(sparse, teacher, data, out, settings)
    student = session.student
    student.network.requires_grad_(False)
    trained = {
        module: attach(student.linear(module), matrix.mask_OI, matrix.stored)
        for module, matrix in student.matrices.items()
    }
    others = _others(student) if settings.train == "all" else {}
    trained |= others
    rates = {name: settings.rate * _root_mean_square(one) for name, one in trained.items()}
    stored = {name: student.view.raw[name].dtype for name in others}
    run = session.train(student.network, trained, rates, stored, progress)
    return session.finish(
        "distill",
        run,
        {name: run.best[name] for name in student.matrices},
        {name: run.best[name] for name in others},
    )


def _others(student: Student) -> dict[str, nn.Parameter]:
    """Everything but the packed matrices, made trainable, by the names of the checkpoint."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in student.network.named_parameters():
        if ".parametrizations." in name:
            continue
        if name not in student.view.raw:
            raise InputError(
                f"train all needs every parameter in the checkpoint, but {name} is not there "
                "by this name; use train kept"
            )
        parameter.requires_grad_(True)
        found[name] = parameter
    return found


def _root_mean_square(parameter: nn.Parameter) -> float:
    scale = float(parameter.detach().square().mean(dtype=torch.float64).sqrt())
    return scale or SCALE_OF_ZEROS
