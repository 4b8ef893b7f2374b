"""What every whole-model recovery does before and after its training loop."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.experts.preflight import check_vocabulary
from moiety.experts.recovery.settings import RecoveryReport, RecoverySettings
from moiety.experts.recovery.student import Student, open_student, write_report
from moiety.experts.recovery.teacher import check_teacher, open_teacher
from moiety.experts.recovery.training import Run, Task, check_split, make_accelerator
from moiety.files import check_new_folder, new_folder
from moiety.progress import SILENT, Progress
from moiety.text import Windows, read_documents, token_windows


@dataclass(frozen=True)
class Session:
    """The checked inputs of one recovery, and the time it began."""

    student: Student
    teacher: Path
    training: Windows
    held: Windows
    out: Path
    settings: RecoverySettings
    accelerator: Accelerator
    started: float

    def train(
        self,
        network: nn.Module,
        trained: Mapping[str, nn.Parameter],
        rates: Mapping[str, float],
        stored: Mapping[str, torch.dtype],
        progress: Progress,
    ) -> Run:
        """Run the loop; see Task. The network has the best parameters afterwards."""
        teacher = open_teacher(self.teacher)
        task = Task(network, trained, rates, stored, teacher, self.training, self.held)
        run = Run(task, self.settings, self.accelerator)
        run.train(progress if self.accelerator.is_main_process else SILENT)
        return run

    def finish(
        self,
        method: str,
        run: Run,
        values: Mapping[str, Tensor],
        others: Mapping[str, Tensor] | None = None,
    ) -> RecoveryReport:
        """Write the packed model (see Student.write) and its report, from one process."""
        report = self._report(method, run)
        if self.accelerator.is_main_process:
            with new_folder(self.out) as scratch:
                self.student.write(scratch, values, others)
                write_report(scratch, report.to_dict())
        self.accelerator.wait_for_everyone()
        return report

    def _report(self, method: str, run: Run) -> RecoveryReport:
        best = run.history[run.best_index]
        return RecoveryReport(
            method=method,
            settings=self.settings.of_run(),
            sparse=str(self.student.folder),
            teacher=str(self.teacher),
            context_length=self.settings.context_length,
            training_windows=len(self.training),
            held_tokens=int(self.held.mask_WC[:, 1:].sum()),
            parameters=sum(one.numel() for one in run.task.trained.values()),
            loss_before=run.history[0].loss,
            loss_after=best.loss,
            loss_teacher=run.held_loss(run.task.teacher),
            steps=run.step,
            best_step=best.step,
            history=tuple(run.history),
            seconds=time.perf_counter() - self.started,
        )


def open_session(
    sparse: str | Path,
    teacher: str | Path,
    data: str | Path | Sequence[str],
    out: str | Path,
    settings: RecoverySettings,
) -> Session:
    """Check and open everything; raises InputError or OutputError before any long work."""
    started = time.perf_counter()
    check_new_folder(Path(out))
    documents = read_documents(data) if isinstance(data, str | Path) else list(data)
    student = open_student(sparse)
    folder = check_teacher(teacher, student)
    windows = token_windows(student.tokenizer, documents, settings.context_length, settings.windows)
    check_vocabulary(windows, student.network.config, student.folder)
    training, held = windows.hold_back(settings.held_every)
    if not len(training) or not len(held):
        raise InputError(
            f"expected at least {settings.held_every} windows of text, so that every "
            f"{settings.held_every}-th can be held back, but there are {len(windows)}; "
            "give more text or lower context_length"
        )
    accelerator = make_accelerator(settings)
    check_split(settings, accelerator)
    return Session(student, folder, training, held, Path(out), settings, accelerator, started)
