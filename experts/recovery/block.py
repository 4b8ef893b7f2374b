"""Block recovery: train one decoder block's kept weights towards the dense hidden states.

Local reconstruction (arXiv:2510.14444): a block has attention and norms between its matrices, so
training them together mends what no refit of one matrix can. W windows of a batch, C context
length, D model width, O/I out/in features, T unpadded tokens, N kept values of a matrix.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.experts.calibrate import BlockBatch
from moiety.experts.recovery.kept import kept_values
from moiety.experts.recovery.schedule import rate_share

BETAS = (0.9, 0.99)
TINY = 1e-12
MODEL, BLOCK = "model", "block"
TARGETS = (MODEL, BLOCK)


@dataclass(frozen=True, kw_only=True)
class BlockRecovery:
    """How to train a block.

    Adam takes one step a batch of windows, `epochs` times over all batches but the `held_back`
    share of them that chooses the best epoch. `rate` is a share of each matrix's
    root-mean-square kept value; it warms up over a twentieth of the steps and falls to 0 by a
    cosine. `seed` orders the batches. `target` is what a block is trained towards: `model`, the
    hidden states of the unpruned model, so that each block also mends what those before it left
    behind, or `block`, what the unpruned block puts out on the pruned blocks' hidden states.
    Either holds a second set of hidden states, in the dtype of the first; `block` drops it after
    each block.
    """

    epochs: int = 16
    rate: float = 0.02
    held_back: float = 0.2
    seed: int = 0
    target: str = MODEL

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "BlockRecovery":
        """From its JSON form; where that names no target, `block` was the only one."""
        return cls(**{"target": BLOCK, **values})

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise InputError(f"target must be one of {', '.join(TARGETS)}, not {self.target!r}")
        if self.epochs < 1:
            raise InputError(f"epochs must be at least 1, but it is {self.epochs}")
        if not 0 < self.rate < 1:
            raise InputError(f"rate must be above 0 and below 1, but it is {self.rate}")
        if not 0 < self.held_back < 1:
            raise InputError(f"held_back must be above 0 and below 1, but it is {self.held_back}")
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, but it is {self.seed}")


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """Error of the block's output on the held-back windows, before and after.

    The error is the mean over tokens of ‖output - target‖² / ‖target‖². `best_epoch` is the one
    whose weights stayed, 0 for those that came. `errors` has one entry an epoch, first the start.
    """

    error_before: float
    error_after: float
    best_epoch: int
    errors: tuple[float, ...]
    training_tokens: int
    held_tokens: int


def reconstruct(
    block: nn.Module,
    batches: Sequence[BlockBatch],
    targets: Sequence[Tensor],
    masks: Mapping[str, Tensor],
    settings: BlockRecovery | None = None,
) -> BlockReport:
    """Train `block.get_submodule(name).weight` where `masks[name]` (O, I) is True, in place.

    `targets` are what the block should put out for each batch (W, C, D): see
    `BlockRecovery.target`. Every token counts the same, whatever its size, because the next block's norm
    takes its size away. Weights outside a mask stay as they are and the error on the held-back
    windows never gets worse; other parameters, `requires_grad` flags and gradients are left
    alone. The same inputs give the same weights. Raises InputError for masks or targets of
    another shape, or when the block's output is not finite.
    """
    settings = settings or BlockRecovery()
    _check_targets(batches, targets)
    training, held = _split(len(batches), settings.held_back)
    pairs = list(zip(batches, targets, strict=True))
    with torch.enable_grad(), _frozen(block), kept_values(block, masks) as values:
        run = _Run(block, pairs, values, settings)
        errors = run.train(training, held)
    best = min(range(len(errors)), key=lambda epoch: (_rank(errors[epoch]), epoch))
    return BlockReport(
        error_before=errors[0],
        error_after=errors[best],
        best_epoch=best,
        errors=tuple(errors),
        training_tokens=sum(int(batches[index].mask_WC.sum()) for index in training),
        held_tokens=sum(int(batches[index].mask_WC.sum()) for index in held),
    )


class _Run:
    """The optimizer of one block's kept values and the best of them so far."""

    def __init__(
        self,
        block: nn.Module,
        pairs: Sequence[tuple[BlockBatch, Tensor]],
        values: Mapping[str, nn.Parameter],
        settings: BlockRecovery,
    ) -> None:
        self.block, self.pairs, self.values, self.settings = block, pairs, values, settings
        self.rates = [settings.rate * _root_mean_square(one_N) for one_N in values.values()]
        groups = [{"params": [one_N]} for one_N in values.values()]
        fused = True if any(one_N.is_cuda for one_N in values.values()) else None
        self.optimizer = torch.optim.Adam(groups, betas=BETAS, fused=fused) if groups else None

    def train(self, training: Sequence[int], held: Sequence[int]) -> list[float]:
        """Errors at the start and after each epoch; the best values stay."""
        errors = [self._error(held)]
        if not math.isfinite(errors[0]):
            raise InputError(
                f"expected finite outputs of the pruned block, but their error is {errors[0]}; "
                "check the weights and the calibration text"
            )
        best = self._snapshot()
        generator = torch.Generator().manual_seed(self.settings.seed)
        epochs = self.settings.epochs if self.values else 0
        for epoch in range(epochs):
            order = torch.randperm(len(training), generator=generator).tolist()
            for place, index in enumerate(order):
                self._step(training[index], epoch * len(order) + place, epochs * len(order))
            errors.append(self._error(held))
            if _rank(errors[-1]) < min(map(_rank, errors[:-1])):
                best = self._snapshot()
        with torch.no_grad():
            for name, one_N in self.values.items():
                one_N.copy_(best[name])
        return errors

    def _step(self, index: int, step: int, steps: int) -> None:
        assert self.optimizer is not None
        errors_T = self._errors(index)
        (errors_T.sum() / max(1, len(errors_T))).backward()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_share(step, steps)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _errors(self, index: int) -> Tensor:
        """Relative error of each unpadded token of one batch."""
        batch, target_WCD = self.pairs[index]
        target_TD = target_WCD[batch.mask_WC].float()
        error_TD = batch.run(self.block)[batch.mask_WC].float() - target_TD
        return error_TD.square().sum(-1) / (target_TD.square().sum(-1) + TINY)

    @torch.no_grad()
    def _error(self, indices: Sequence[int]) -> float:
        errors = [self._errors(index) for index in indices]
        return float(torch.cat(errors).mean(dtype=torch.float64))

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: one_N.detach().clone() for name, one_N in self.values.items()}


def _root_mean_square(values_N: Tensor) -> float:
    return float(values_N.detach().square().mean().sqrt())


def _rank(error: float) -> float:
    return error if math.isfinite(error) else math.inf


def _split(count: int, held_back: float) -> tuple[list[int], list[int]]:
    """Batches to train on and those held back, evenly spread; a single batch is both."""
    if count == 1:
        return [0], [0]
    late = min(count - 1, max(1, round(count * held_back)))
    held = [(place + 1) * count // late - 1 for place in range(late)]
    return sorted(set(range(count)) - set(held)), held


def _check_targets(batches: Sequence[BlockBatch], targets: Sequence[Tensor]) -> None:
    shapes = [tuple(batch.hidden_WCD.shape) for batch in batches]
    given = [tuple(target_WCD.shape) for target_WCD in targets]
    if not batches or shapes != given:
        raise InputError(
            "expected at least one batch and a target of the same shape for each, "
            f"but there are {len(batches)} batches and {len(targets)} targets"
            + next(
                (f", one {a} for {b}" for a, b in zip(given, shapes, strict=False) if a != b), ""
            )
        )


@contextlib.contextmanager
def _frozen(block: nn.Module) -> Iterator[None]:
    """No parameter of the block wants a gradient inside; flags and gradients come back after."""
    before = {one: (one.requires_grad, one.grad) for one in block.parameters()}
    for one in before:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one, (flag, gradient) in before.items():
            one.requires_grad_(flag)
            one.grad = gradient
