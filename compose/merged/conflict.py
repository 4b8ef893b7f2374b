"""Conflict-aware sparse task vectors: each kept place belongs to one finetune.

After CABS (Yang et al. 2025, arXiv:2503.01874), which prunes the task vectors one after the
other, each N:M by magnitude among the places that the ones before it left, so that each finetune
has N:M of its own and the sum is denser the more there are. Here the finetunes contest all places
at once: every place goes to the finetune with the highest score there, and the pattern then keeps
the places with the highest scores, so that the sum itself has the pattern, no order of the
finetunes is preferred, and nobody is promised a share. The score is Wanda's (Sun et al. 2023,
arXiv:2306.11695) on the weighted difference, `|c (W_e - W_0)| · ‖x‖`, with the norms of the
inputs that the base has on the finetune's own domain.

E finetunes, O out features, I in features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moiety.experts.calibrate import GramCollector, linears_of
from moiety.experts.pattern import Pattern
from moiety.experts.stream import StreamedModel
from moiety.progress import SILENT, Progress
from moiety.text import Windows


@dataclass(frozen=True)
class Contested:
    """One matrix's merged task vector (O, I), its mask, and how many non-zeros each finetune has."""

    delta_OI: Tensor
    mask_OI: Tensor
    places: dict[str, int]


def contest(
    deltas: Iterable[tuple[str, Tensor]],
    coefficients: Mapping[str, float],
    norms: Mapping[str, Tensor],
    pattern: Pattern,
) -> Contested:
    """Merge the differences (O, I) of one matrix so that the result follows `pattern`.

    `deltas` are taken one at a time, by finetune; `coefficients` are the method's, `norms` (I,)
    those of each domain's inputs. Ties go to the finetune that comes first.
    """
    best_OI = delta_OI = owner_OI = torch.empty(0)
    names: list[str] = []
    for number, (name, own_OI) in enumerate(deltas):
        names.append(name)
        weighted_OI = coefficients[name] * own_OI
        score_OI = weighted_OI.abs() * norms[name]
        if number == 0:
            best_OI, delta_OI = score_OI, weighted_OI
            owner_OI = torch.zeros_like(score_OI, dtype=torch.int16)
            continue
        wins_OI = score_OI > best_OI
        best_OI = torch.where(wins_OI, score_OI, best_OI)
        delta_OI = torch.where(wins_OI, weighted_OI, delta_OI)
        owner_OI.masked_fill_(wins_OI, number)
    mask_OI = pattern.mask(best_OI)
    delta_OI = torch.where(mask_OI, delta_OI, 0.0)
    counts = torch.bincount(owner_OI[delta_OI != 0].int(), minlength=len(names)).tolist()
    return Contested(delta_OI, mask_OI, dict(zip(names, counts, strict=True)))


def input_norms(
    stream: StreamedModel,
    windows: Windows,
    sites: str,
    batch_size: int,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """Norm of every input feature (I,) over all tokens, for each linear layer at `sites`."""
    norms: dict[str, Tensor] = {}
    batches = stream.capture(windows, batch_size)
    for index in progress.track(range(len(stream)), "measure inputs", len(stream)):
        stream.enter(index, batches)
        with stream.block(index) as block:
            outputs: list[Tensor] = []
            grams = GramCollector(linears_of(block, sites)).run(block, batches, outputs)
        for name, gram_II in grams.items():
            norms[stream.name(index, name)] = gram_II.diagonal().clamp(min=0).sqrt()
        for batch, output in zip(batches, outputs, strict=True):
            batch.hidden_WCD = output
    return norms
