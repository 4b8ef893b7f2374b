"""Train the gates of a composite, everything else frozen.

E experts, W features of a gate (the model's width, or more for one with contexts).
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.progress import SILENT, Progress
from moiety.routers import checkpoint
from moiety.routers.evaluation import Evaluation, evaluate, oracle_losses
from moiety.routers.gates import Gate
from moiety.routers.labelled import LabelledText
from moiety.routers.masters import Masters, only_gates_train
from moiety.routers.objective import batch_loss, check_objective
from moiety.routers.passes import check_domains, evaluating, input_device, linear_gates
from moiety.routers.sampling import EqualDomains, LabelledWindows, labelled_texts, loader
from moiety.routers.settings import TrainReport, TrainSettings
from moiety.routers.sharding import check_batches, let_go
from moiety.routers.together import from_first
from moiety.routers.tracking import start_trackers, stop_trackers
from moiety.text import Windows


def train(
    model: nn.Module,
    data: Mapping[str, Windows],
    heldout: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    settings: TrainSettings | None = None,
    progress: Progress = SILENT,
) -> TrainReport:
    """Train the gates on `data`; keep the state with the lowest regret on `heldout`.

    The gates as they came are one of the states, so held-out loss never gets worse. Frozen
    weights are not touched, and `requires_grad` flags and training modes come back. On an
    error the gates are as they came. Runs under `torchrun` or `accelerate launch`, the model on
    each process's own device: the windows of a step are spread over the processes, and the
    result is that of one process up to float rounding. With `settings.checkpoint` a stopped
    run goes on from its last evaluation, on any number of processes, and ends in the same bits
    on the same number. Raises InputError for gates that are not linear, domains without own
    expert, a loss that gives gates no gradient, a balance that they cannot have, windows that do
    not divide among the processes, a model whose loss is not finite, or a foreign checkpoint.
    """
    settings = settings or TrainSettings()
    started = time.perf_counter()
    gates = linear_gates(model)
    check_domains(data, own_expert, gates)
    check_domains(heldout, own_expert, gates)
    check_objective(gates, settings)
    check_batches(model)
    texts = [
        labelled_texts(text, own_expert, settings.switching, settings.seed)
        for text in (data, heldout)
    ]
    accelerator = _accelerator(input_device(model), settings)
    _check_split(len(texts[0]), settings, accelerator)
    with evaluating(model), only_gates_train(model, gates):
        run = _Run(model, gates, texts[0], texts[1], settings, accelerator)
        run.train(progress if accelerator.is_main_process else SILENT)
    return run.report(time.perf_counter() - started)


def _accelerator(device: torch.device, settings: TrainSettings) -> Accelerator:
    options: dict[str, Any] = {
        "dataloader_config": DataLoaderConfiguration(split_batches=True),
        "device_placement": False,
    }
    if settings.trackers:
        options |= {"log_with": list(settings.trackers), "project_dir": settings.log_dir}
    if not is_initialized():
        options |= {"cpu": device.type == "cpu", "mixed_precision": "no"}
    return Accelerator(**options)


def _check_split(texts: int, settings: TrainSettings, accelerator: Accelerator) -> None:
    windows = texts * settings.windows_per_domain
    if windows % accelerator.num_processes:
        raise InputError(
            "the windows of a step must divide evenly among the "
            f"{accelerator.num_processes} processes, but they are {windows}, windows_per_domain "
            f"of each of {texts} texts (the domains, and that which switches between them); "
            "change windows_per_domain"
        )


class _Run:
    """One training run: the masters, their optimizer, and the history of evaluations."""

    def __init__(
        self,
        model: nn.Module,
        gates: Sequence[Gate],
        texts: Mapping[str, LabelledText],
        heldout: Mapping[str, LabelledText],
        settings: TrainSettings,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.gates, self.settings = model, gates, settings
        self.heldout, self.accelerator = heldout, accelerator
        self.windows = LabelledWindows(texts)
        self.masters = Masters(gates)
        self.start = self.masters.snapshot()
        self.best = self.masters.snapshot()
        self.plain_optimizer = torch.optim.Adam(
            self.masters.masters.values(), lr=settings.learning_rate
        )
        self.optimizer = accelerator.prepare(self.plain_optimizer)
        self.oracle: dict[str, float] = {}
        self.history: list[Evaluation] = []
        self.step = 0
        self.name = self._name() if settings.checkpoint else ""

    def train(self, progress: Progress) -> None:
        """Take all steps and leave the best gates in the model; on an error, the first ones."""
        try:
            self._resume()
            if not self._finished():
                start_trackers(self.accelerator, self.settings.of_run())
            if not self.history:
                self._evaluate_oracle()
                self._evaluate(progress)
            self._take_steps(progress)
            self.masters.write_gates(self.best)
        except BaseException:
            self.masters.write_gates(self.start)
            raise
        finally:
            stop_trackers(self.accelerator)
            let_go(self.model)

    def report(self, seconds: float) -> TrainReport:
        """What was done."""
        best = self.history[self._best_index()]
        return TrainReport(
            parameters=sum(weight_EW.numel() for weight_EW in self.masters.weights.values()),
            trained=tuple(self.masters.weights),
            balanced=tuple(self.masters.biases) if self.settings.balance == "bias" else (),
            objective=self.settings.objective,
            steps=self.step,
            best_step=best.step,
            start_loss=self.history[0].loss,
            best_loss=best.loss,
            start_regret=self.history[0].regret,
            best_regret=best.regret,
            oracle_losses=dict(self.oracle),
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
            self.step += 1
            self._take_step(batch)
            if self.step % settings.eval_every == 0 or self.step == settings.steps:
                self._evaluate(progress)
                if self._finished():
                    return

    def _take_step(self, batch: dict[str, Tensor]) -> None:
        result = batch_loss(self.model, self.gates, batch, self.settings, self.accelerator)
        result.loss.backward()
        self.masters.take_gradients(self.accelerator)
        nn.utils.clip_grad_norm_(self.masters.masters.values(), self.settings.max_gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.settings.balance == "bias":
            self.masters.balance(result.counts, self.settings.bias_step)
        self.masters.write()
        if self.settings.trackers:
            parts = {"loss": result.loss.detach(), **result.parts}
            self._log("train", {name: self._total(part) for name, part in parts.items()})

    def _total(self, share: Tensor) -> float:
        return float(cast(Tensor, self.accelerator.reduce(share, "sum")))

    def _log(self, section: str, values: Mapping[str, float]) -> None:
        named = {f"{section}/{name}": value for name, value in values.items()}
        self.accelerator.log(named, step=self.step)

    def _evaluate_oracle(self) -> None:
        self.oracle = oracle_losses(
            self.model,
            self.gates,
            self.heldout,
            self.accelerator,
            batch_size=self.settings.batch_size,
        )
        for name, loss in self.oracle.items():
            self._check_finite(loss, f"with every token of {name} at its own expert")

    def _check_finite(self, loss: float, when: str) -> None:
        if not math.isfinite(loss):
            raise InputError(
                f"expected a finite held-out loss {when}, but it is {loss}; "
                "check the weights of the model"
            )

    def _evaluate(self, progress: Progress) -> None:
        evaluation = evaluate(
            self.model,
            self.gates,
            self.heldout,
            self.oracle,
            self.accelerator,
            batch_size=self.settings.batch_size,
            step=self.step,
        )
        if not self.history:
            self._check_finite(evaluation.loss, "before training")
        self.history.append(evaluation)
        if self._best_index() == len(self.history) - 1:
            self.best = self.masters.snapshot()
        self._save()
        plain = evaluation.to_json()
        losses = plain.pop("domain_losses")
        self._log("heldout", plain | {f"loss/{name}": loss for name, loss in losses.items()})
        progress.note(evaluation.line())

    def _best_index(self) -> int:
        """The first of the lowest regrets; one that is not finite never is."""
        best = 0
        for index, evaluation in enumerate(self.history):
            if evaluation.regret < self.history[best].regret:
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
        for name, labelled in self.heldout.items():
            for field, tensor in vars(labelled).items():
                text[f"heldout/{name}/{field}"] = tensor
        return checkpoint.fingerprint(self.model, self.settings.of_run(), text)

    def _save(self) -> None:
        folder = self.settings.checkpoint
        if folder is None:
            return
        if self.accelerator.is_main_process:
            history = [evaluation.to_json() for evaluation in self.history]
            state = checkpoint.State(self.step, self.oracle, history, self._tensors())
            checkpoint.save(folder, self.name, state)
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"bias/{name}": bias_E for name, bias_E in self.masters.biases.items()}
        for name, master_EW in self.masters.masters.items():
            tensors[f"master/{name}"] = master_EW
            for key, value in self.plain_optimizer.state.get(master_EW, {}).items():
                tensors[f"adam/{key}/{name}"] = value
        return tensors

    def _resume(self) -> None:
        folder = self.settings.checkpoint
        if folder is None:
            return
        state = from_first(lambda: checkpoint.load(folder, self.name))
        if state is None:
            return
        self.step = state.step
        self.oracle = state.oracle
        self.history = [Evaluation.from_json(value) for value in state.history]
        self.best = {name: state.tensors[f"best/{name}"] for name in self.best}
        for name, bias_E in self.masters.biases.items():
            bias_E.copy_(state.tensors[f"bias/{name}"])
        self._resume_optimizer(state.tensors)
        self.masters.write()

    def _resume_optimizer(self, tensors: dict[str, Tensor]) -> None:
        moments: dict[int, dict[str, Any]] = {}
        for index, (name, master_EW) in enumerate(self.masters.masters.items()):
            master_EW.data.copy_(tensors[f"master/{name}"])
            keys = [
                key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam/{key}/{name}" in tensors
            ]
            if keys:
                moments[index] = {key: tensors[f"adam/{key}/{name}"] for key in keys}
        groups = self.plain_optimizer.state_dict()["param_groups"]
        self.plain_optimizer.load_state_dict({"state": moments, "param_groups": groups})
