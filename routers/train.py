"""Train the gates of a composite, everything else frozen.

D model width, E experts.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.progress import SILENT, Progress
from moiety.routers import checkpoint
from moiety.routers.evaluation import Evaluation, evaluate
from moiety.routers.gates import Gate
from moiety.routers.masters import Masters, only_gates_train
from moiety.routers.objective import batch_loss
from moiety.routers.passes import check_domains, evaluating, input_device, linear_gates
from moiety.routers.sampling import EqualDomains, LabelledWindows, loader
from moiety.routers.settings import TrainReport, TrainSettings
from moiety.text import Windows


def train(
    model: nn.Module,
    data: Mapping[str, Windows],
    heldout: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    settings: TrainSettings | None = None,
    progress: Progress = SILENT,
) -> TrainReport:
    """Train the gates on `data`; keep the state with the lowest loss on `heldout`.

    The gates as they came are one of the states, so held-out loss never gets worse. Frozen
    weights are not touched, and `requires_grad` flags and training modes come back. On an
    error the gates are as they came. Runs under `torchrun` or `accelerate launch`, the model on
    each process's own device: the windows of a step are spread over the processes, and the
    result is that of one process up to float rounding. With `settings.checkpoint` a stopped
    run goes on where it was and ends in the same bits. Raises InputError for gates that are not
    linear, domains without own expert, a loss that gives gates no gradient, windows that do not
    divide among the processes, a model whose loss is not finite, or a foreign checkpoint.
    """
    settings = settings or TrainSettings()
    started = time.perf_counter()
    gates = linear_gates(model)
    check_domains(data, own_expert, gates)
    check_domains(heldout, own_expert, gates)
    _check_gradient(gates, settings)
    accelerator = _accelerator(input_device(model))
    _check_split(len(data), settings, accelerator)
    with evaluating(model), only_gates_train(model, gates):
        run = _Run(model, gates, data, heldout, own_expert, settings, accelerator)
        run.train(progress if accelerator.is_main_process else SILENT)
    return run.report(time.perf_counter() - started)


def _check_gradient(gates: Sequence[Gate], settings: TrainSettings) -> None:
    for gate in gates:
        renormalised = getattr(gate.module, "norm_topk_prob", True)
        if gate.active == 1 and renormalised and settings.domain_weight == 0:
            raise InputError(
                f"domain_weight must be positive, but it is 0 and {gate.name} chooses one expert: "
                "its renormalised weight is always 1, so next-token loss gives the gate no "
                "gradient; raise domain_weight, or let each token take two experts"
            )


def _accelerator(device: torch.device) -> Accelerator:
    split = DataLoaderConfiguration(split_batches=True)
    if is_initialized():
        return Accelerator(dataloader_config=split, device_placement=False)
    return Accelerator(
        dataloader_config=split,
        device_placement=False,
        cpu=device.type == "cpu",
        mixed_precision="no",
    )


def _check_split(domains: int, settings: TrainSettings, accelerator: Accelerator) -> None:
    windows = domains * settings.windows_per_domain
    if windows % accelerator.num_processes:
        raise InputError(
            f"windows_per_domain x domains must be divisible by the {accelerator.num_processes} "
            f"processes, but it is {windows}; change windows_per_domain"
        )


class _Run:
    """One training run: the masters, their optimizer, and the history of evaluations."""

    def __init__(
        self,
        model: nn.Module,
        gates: Sequence[Gate],
        data: Mapping[str, Windows],
        heldout: Mapping[str, Windows],
        own_expert: Mapping[str, int],
        settings: TrainSettings,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.gates, self.settings = model, gates, settings
        self.heldout, self.own_expert, self.accelerator = heldout, own_expert, accelerator
        self.windows = LabelledWindows(data, own_expert)
        self.masters = Masters(gates)
        self.start = self.masters.snapshot()
        self.best = self.masters.snapshot()
        self.plain_optimizer = torch.optim.Adam(
            self.masters.masters.values(), lr=settings.learning_rate
        )
        self.optimizer = accelerator.prepare(self.plain_optimizer)
        self.history: list[Evaluation] = []
        self.step = 0
        self.name = self._name() if settings.checkpoint else ""

    def train(self, progress: Progress) -> None:
        """Take all steps and leave the best gates in the model; on an error, the first ones."""
        try:
            self._resume()
            if not self.history:
                self._evaluate(progress)
            self._take_steps(progress)
            self.masters.write_weights(self.best)
        except BaseException:
            self.masters.write_weights(self.start)
            raise

    def report(self, seconds: float) -> TrainReport:
        """What was done."""
        best = self.history[self._best_index()]
        return TrainReport(
            parameters=sum(weight_ED.numel() for weight_ED in self.masters.weights.values()),
            trained=tuple(self.masters.weights),
            steps=self.step,
            best_step=best.step,
            start_loss=self.history[0].loss,
            best_loss=best.loss,
            history=tuple(self.history),
            seconds=seconds,
        )

    def _take_steps(self, progress: Progress) -> None:
        settings = self.settings
        if self._finished():
            return
        sampler = EqualDomains(
            self.windows.sizes,
            settings.windows_per_domain,
            settings.seed,
            self.step,
            settings.steps,
        )
        batches = self.accelerator.prepare(loader(self.windows, sampler))
        for batch in progress.track(batches, "training gates", len(sampler)):
            self._take_step(batch)
            self.step += 1
            if self.step % settings.eval_every == 0 or self.step == settings.steps:
                self._evaluate(progress)
                if self._finished():
                    return

    def _take_step(self, batch: dict[str, Tensor]) -> None:
        loss = batch_loss(self.model, self.gates, batch, self.settings, self.accelerator)
        loss.backward()
        self.masters.take_gradients(self.accelerator)
        nn.utils.clip_grad_norm_(self.masters.masters.values(), self.settings.max_gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.masters.write()

    def _evaluate(self, progress: Progress) -> None:
        evaluation = evaluate(
            self.model,
            self.gates,
            self.heldout,
            self.own_expert,
            self.accelerator,
            batch_size=self.settings.batch_size,
            step=self.step,
        )
        if not self.history and not torch.tensor(evaluation.loss).isfinite():
            raise InputError(
                f"expected a finite held-out loss before training, but it is {evaluation.loss}; "
                "check the weights of the model"
            )
        self.history.append(evaluation)
        if self._best_index() == len(self.history) - 1:
            self.best = self.masters.snapshot()
        self._save()
        progress.note(evaluation.line())

    def _best_index(self) -> int:
        """The first of the lowest losses; a loss that is not finite is never one."""
        best = 0
        for index, evaluation in enumerate(self.history):
            if evaluation.loss < self.history[best].loss:
                best = index
        return best

    def _finished(self) -> bool:
        waited = len(self.history) - 1 - self._best_index()
        return self.step >= self.settings.steps or waited >= self.settings.patience

    def _name(self) -> str:
        text = {
            f"train/{name}": tensor
            for name, tensor in vars(self.windows).items()
            if isinstance(tensor, Tensor)
        }
        for domain, windows in self.heldout.items():
            text[f"heldout/{domain}/ids"] = windows.ids_WC
            text[f"heldout/{domain}/mask"] = windows.mask_WC
        described = self.settings.of_run() | {"own_expert": dict(self.own_expert)}
        return checkpoint.fingerprint(self.model, described, text)

    def _save(self) -> None:
        folder = self.settings.checkpoint
        if folder is None:
            return
        if self.accelerator.is_main_process:
            history = [evaluation.to_json() for evaluation in self.history]
            checkpoint.save(
                folder, self.name, checkpoint.State(self.step, history, self._tensors())
            )
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, master_ED in self.masters.masters.items():
            tensors[f"master/{name}"] = master_ED
            for key, value in self.plain_optimizer.state.get(master_ED, {}).items():
                tensors[f"adam/{key}/{name}"] = value
        return tensors

    def _resume(self) -> None:
        folder = self.settings.checkpoint
        state = checkpoint.load(folder, self.name) if folder else None
        if state is None:
            return
        self.step = state.step
        self.history = [Evaluation.from_json(value) for value in state.history]
        self.best = {name: state.tensors[f"best/{name}"] for name in self.best}
        self._resume_optimizer(state.tensors)
        self.masters.write()

    def _resume_optimizer(self, tensors: dict[str, Tensor]) -> None:
        moments: dict[int, dict[str, Any]] = {}
        for index, (name, master_ED) in enumerate(self.masters.masters.items()):
            master_ED.data.copy_(tensors[f"master/{name}"])
            keys = [
                key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam/{key}/{name}" in tensors
            ]
            if keys:
                moments[index] = {key: tensors[f"adam/{key}/{name}"] for key in keys}
        groups = self.plain_optimizer.state_dict()["param_groups"]
        self.plain_optimizer.load_state_dict({"state": moments, "param_groups": groups})
