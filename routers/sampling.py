"""Training batches in which every domain has the same number of windows.

W windows, C context length.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from moiety.text import Windows


class LabelledWindows(Dataset[dict[str, Tensor]]):
    """All domains' windows in one list, padded to one length, each with its own expert.

    An item is `ids_C`, `mask_C` and the scalar `own`, stacked to `ids_WC`, `mask_WC`, `own_W`.
    """

    def __init__(self, data: Mapping[str, Windows], own_expert: Mapping[str, int]) -> None:
        longest = max(windows.ids_WC.shape[1] for windows in data.values())
        self.ids_WC = _stack([windows.ids_WC for windows in data.values()], longest)
        self.mask_WC = _stack([windows.mask_WC for windows in data.values()], longest)
        owners = [torch.full((len(windows),), own_expert[name]) for name, windows in data.items()]
        self.own_W = torch.cat(owners)
        self.sizes = [len(windows) for windows in data.values()]

    def __len__(self) -> int:
        return len(self.own_W)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "ids_WC": self.ids_WC[index],
            "mask_WC": self.mask_WC[index],
            "own_W": self.own_W[index],
        }


def _stack(pieces: Sequence[Tensor], longest: int) -> Tensor:
    return torch.cat([pad(piece_WC, (0, longest - piece_WC.shape[1])) for piece_WC in pieces])


class EqualDomains:
    """A batch sampler: `per_domain` rows of each domain a batch, without replacement.

    Every domain is read in a new random order each time it has been used up. The batch of a step
    is a function of the seed and the step alone, so a run can start anywhere with no state.
    """

    drop_last = False

    def __init__(
        self, sizes: Sequence[int], per_domain: int, seed: int, start: int, steps: int
    ) -> None:
        self.sizes = list(sizes)
        self.per_domain = per_domain
        self.seed = seed
        self.start = start
        self.steps = steps
        self.batch_size = per_domain * len(self.sizes)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            yield self.rows(step)

    def rows(self, step: int) -> list[int]:
        """The rows of one step's batch; the domains alternate, so that any split mixes them."""
        first = step * self.per_domain
        return [
            self._row(domain, position)
            for position in range(first, first + self.per_domain)
            for domain in range(len(self.sizes))
        ]

    def _row(self, domain: int, position: int) -> int:
        epoch, place = divmod(position, self.sizes[domain])
        order = np.random.default_rng([self.seed, domain, epoch]).permutation(self.sizes[domain])
        return sum(self.sizes[:domain]) + int(order[place])


def loader(windows: LabelledWindows, sampler: EqualDomains) -> DataLoader[dict[str, Tensor]]:
    """A loader that leaves torch's global random state alone."""
    return DataLoader(windows, batch_sampler=sampler, generator=torch.Generator())
