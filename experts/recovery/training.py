"""The training loop of whole-model recovery: accelerate's, resumable, keeping the best step.

W windows, C context length.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, KwargsHandler
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.experts.recovery import checkpoint
from moiety.experts.recovery.evaluation import as_stored, evaluate
from moiety.experts.recovery.objective import distillation_loss
from moiety.experts.recovery.schedule import Shuffled, loader, rate_share
from moiety.experts.recovery.settings import Evaluation, RecoverySettings
from moiety.progress import Progress
from moiety.text import Windows

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def make_accelerator(settings: RecoverySettings) -> Accelerator:
    """accelerate as launched: one process, or as many as `accelerate launch` started.

    Raises InputError when this process already runs accelerate in another precision.
    """
    if is_initialized() and AcceleratorState().mixed_precision != settings.mixed_precision:
        raise InputError(
            f"mixed_precision must be {AcceleratorState().mixed_precision}, in which accelerate "
            f"already runs in this process, but it is {settings.mixed_precision}"
        )
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    return Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=handlers,
        mixed_precision=settings.mixed_precision,
    )


def check_split(settings: RecoverySettings, accelerator: Accelerator) -> None:
    """Raise InputError unless a step's windows divide among the processes."""
    if settings.batch_size % accelerator.num_processes:
        raise InputError(
            f"batch_size must be divisible by the {accelerator.num_processes} processes, "
            f"but it is {settings.batch_size}"
        )


@dataclass(frozen=True)
class Task:
    """What is trained: parameters of a network by name, the rate of each, and on which text.

    `stored` says in which dtype a parameter will be saved, for those whose network does not round
    by itself.
    """

    network: nn.Module
    trained: Mapping[str, nn.Parameter]
    rates: Mapping[str, float]
    stored: Mapping[str, torch.dtype]
    teacher: nn.Module
    training: Windows
    held: Windows


class Run:
    """One training run: optimizer, evaluations so far and the best parameters."""

    def __init__(self, task: Task, settings: RecoverySettings, accelerator: Accelerator) -> None:
        self.task, self.settings, self.accelerator = task, settings, accelerator
        if settings.activation_checkpointing:
            cast(Any, task.network).activation_checkpointing_enable()
        task.network.train(settings.activation_checkpointing)
        task.teacher.to(accelerator.device)
        self.name = self._name() if settings.checkpoint else ""
        groups = [{"params": [one], "lr": task.rates[name]} for name, one in task.trained.items()]
        self.plain_optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        self.model, self.optimizer = accelerator.prepare(task.network, self.plain_optimizer)
        self.history: list[Evaluation] = []
        self.best: dict[str, Tensor] = {}
        self.step = 0

    @property
    def best_index(self) -> int:
        """The first of the lowest losses; a loss that is not finite is never one."""
        best = 0
        for index, evaluation in enumerate(self.history):
            if evaluation.loss < self.history[best].loss:
                best = index
        return best

    def train(self, progress: Progress) -> dict[str, Tensor]:
        """Take all steps; gives the best parameters, which the network then has."""
        self._resume()
        if not self.history:
            self._evaluate(progress)
        self._take_steps(progress)
        with torch.no_grad():
            for name, one in self.task.trained.items():
                one.copy_(self.best[name])
        return self.best

    def _take_steps(self, progress: Progress) -> None:
        settings = self.settings
        if self._finished():
            return
        size = len(self.task.training)
        sampler = Shuffled(size, settings.batch_size, settings.seed, self.step, settings.steps)
        batches = self.accelerator.prepare(loader(self.task.training, sampler))
        for batch in progress.track(batches, "recovery", len(sampler)):
            self._take_step(batch["ids_WC"], batch["mask_WC"])
            self.step += 1
            if self.step % settings.eval_every == 0 or self.step == settings.steps:
                self._evaluate(progress)
                if self._finished():
                    return

    def _take_step(self, ids_WC: Tensor, mask_WC: Tensor) -> None:
        """One step; each window counts by its predicted tokens, however windows are split."""
        settings, accelerator = self.settings, self.accelerator
        predicted = cast(Tensor, accelerator.reduce(mask_WC[:, 1:].sum(), "sum"))
        parts = range(0, len(ids_WC), settings.micro_batch)
        for start in parts:
            part = slice(start, start + settings.micro_batch)
            last = start == parts[-1]
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                loss = self._loss(ids_WC[part], mask_WC[part]) / predicted
                accelerator.backward(loss * accelerator.num_processes)
        accelerator.clip_grad_norm_(list(self.task.trained.values()), settings.max_gradient)
        for group, name in zip(self.plain_optimizer.param_groups, self.task.trained, strict=True):
            group["lr"] = self.task.rates[name] * rate_share(self.step, settings.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, ids_WC: Tensor, mask_WC: Tensor) -> Tensor:
        hidden = self.settings.square_head > 0
        inputs = {"input_ids": ids_WC, "attention_mask": mask_WC, "use_cache": False}
        with torch.no_grad(), self.accelerator.autocast():
            teacher = self.task.teacher(**inputs, output_hidden_states=hidden)
        student = self.model(**inputs, output_hidden_states=hidden)
        return distillation_loss(student, teacher, ids_WC, mask_WC, self.settings)

    def _evaluate(self, progress: Progress) -> None:
        with as_stored(self.task.trained, self.task.stored):
            loss = self.held_loss(self.task.network)
            if not self.history or loss < self.history[self.best_index].loss:
                self.best = {name: one.detach().clone() for name, one in self.task.trained.items()}
        if not self.history and not math.isfinite(loss):
            raise InputError(
                f"expected a finite held-back loss before training, but it is {loss}; "
                "check the weights of the model"
            )
        self.history.append(Evaluation(self.step, loss))
        self._save()
        progress.note(f"step {self.step}: {loss:.4f} nats a token on held-back documents")

    def held_loss(self, network: nn.Module) -> float:
        """Nats a token of a network on the held-back documents."""
        training = network.training
        network.eval()
        loss = evaluate(network, self.task.held, self.settings.micro_batch, self.accelerator)
        network.train(training)
        return loss

    def _finished(self) -> bool:
        waited = len(self.history) - 1 - self.best_index
        return self.step >= self.settings.steps or waited >= self.settings.patience

    def _name(self) -> str:
        windows = {"training": self.task.training, "held": self.task.held}
        text = {f"{name}/ids": one.ids_WC for name, one in windows.items()}
        text |= {f"{name}/mask": one.mask_WC for name, one in windows.items()}
        models = {f"student/{name}": one for name, one in self.task.network.state_dict().items()}
        models |= {f"teacher/{name}": one for name, one in self.task.teacher.state_dict().items()}
        return checkpoint.fingerprint(self.settings.of_run(), text, models)

    def _save(self) -> None:
        folder = self.settings.checkpoint
        if folder is None:
            return
        if self.accelerator.is_main_process:
            state = checkpoint.State(self.step, self.history, self._tensors())
            checkpoint.save(Path(folder), self.name, state)
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"best/{name}": one for name, one in self.best.items()}
        for name, one in self.task.trained.items():
            tensors[f"now/{name}"] = one
            for key, value in self.plain_optimizer.state.get(one, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    @torch.no_grad()
    def _resume(self) -> None:
        folder = self.settings.checkpoint
        state = checkpoint.load(Path(folder), self.name) if folder else None
        if state is None:
            return
        self.step, self.history = state.step, state.history
        moments: dict[int, dict[str, Any]] = {}
        for index, (name, one) in enumerate(self.task.trained.items()):
            one.copy_(state.tensors[f"now/{name}"])
            self.best[name] = state.tensors[f"best/{name}"].to(one.device)
            keys = [key for key in MOMENTS if f"{key}/{name}" in state.tensors]
            if keys:
                moments[index] = {key: state.tensors[f"{key}/{name}"] for key in keys}
        groups = self.plain_optimizer.state_dict()["param_groups"]
        self.plain_optimizer.load_state_dict({"state": moments, "param_groups": groups})
