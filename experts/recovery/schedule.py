"""What a training step reads and how far it goes: functions of the step alone, so runs resume.

W windows, C context length.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moiety.text import Windows

WARM_UP_SHARE = 0.05


def rate_share(step: int, steps: int) -> float:
    """The share of the peak rate that step `step` of `steps` takes: linear warm-up, then cosine."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


class WindowRows(Dataset[dict[str, Tensor]]):
    """Windows one by one: `ids_C` and `mask_C`, which stack to `ids_WC` and `mask_WC`."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        windows = self.windows
        return {"ids_WC": windows.ids_WC[index], "mask_WC": windows.mask_WC[index]}


class Shuffled:
    """A batch sampler: rows without replacement, in a new order every time all have been read."""

    drop_last = False

    def __init__(self, size: int, batch_size: int, seed: int, start: int, steps: int) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.steps = steps

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            first = step * self.batch_size
            yield [self._row(place) for place in range(first, first + self.batch_size)]

    def _row(self, place: int) -> int:
        epoch, index = divmod(place, self.size)
        return int(np.random.default_rng([self.seed, epoch]).permutation(self.size)[index])


def loader(windows: Windows, sampler: Shuffled) -> DataLoader[dict[str, Tensor]]:
    """A loader that leaves torch's global random state alone."""
    rows = WindowRows(windows)
    return DataLoader(rows, batch_sampler=sampler, generator=torch.Generator())
