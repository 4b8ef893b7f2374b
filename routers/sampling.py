"""Training batches in which every text, each domain's and the stitched one, counts the same.

W windows, C context length.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from moiety.routers.labelled import LabelledText, of_domain, stitched
from moiety.text import Windows

SWITCHING = "(switching)"
"""What the text that switches domain inside its windows is called beside the domains."""


def labelled_texts(
    data: Mapping[str, Windows], own_expert: Mapping[str, int], switching: bool, seed: int
) -> dict[str, LabelledText]:
    """Every domain's text and, with `switching`, one that switches between them, under `SWITCHING`.

    That one has as many windows as the largest domain. Domains that share one expert give no
    text to stitch, so then there is none.
    """
    texts = {name: of_domain(windows, own_expert[name]) for name, windows in data.items()}
    if switching and len({own_expert[name] for name in data}) > 1:
        count = max(len(windows) for windows in data.values())
        texts[SWITCHING] = stitched(data, own_expert, count, seed)
    return texts


class LabelledWindows(Dataset[dict[str, Tensor]]):
    """All texts' windows in one list, padded to one length, each token with its own expert.

    An item is `ids_C`, `mask_C` and `own_C` (-1 for padding), stacked to `ids_WC` and so on.
    """

    def __init__(self, texts: Mapping[str, LabelledText]) -> None:
        longest = max(text.ids_WC.shape[1] for text in texts.values())
        self.ids_WC = _stack([text.ids_WC for text in texts.values()], longest, 0)
        self.mask_WC = _stack([text.mask_WC for text in texts.values()], longest, 0)
        self.own_WC = _stack([text.own_WC for text in texts.values()], longest, -1)
        self.sizes = [len(text) for text in texts.values()]

    def __len__(self) -> int:
        return len(self.ids_WC)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "ids_WC": self.ids_WC[index],
            "mask_WC": self.mask_WC[index],
            "own_WC": self.own_WC[index],
        }


def _stack(pieces: Sequence[Tensor], longest: int, padding: int) -> Tensor:
    padded = [pad(piece_WC, (0, longest - piece_WC.shape[1]), value=padding) for piece_WC in pieces]
    return torch.cat(padded)


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
