"""Text whose every token has an own expert: one domain's, or windows that switch domain inside.

W windows, C context length, S tokens of a segment.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.text import Windows


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """Windows of token ids with the expert that each token should go to.

    `ids_WC` int64, padded on the right; `mask_WC` 1 for tokens, 0 for padding; `own_WC` int64,
    -1 for tokens that are context only and not counted, padding among them.
    """

    ids_WC: Tensor
    mask_WC: Tensor
    own_WC: Tensor

    def __len__(self) -> int:
        return self.ids_WC.shape[0]

    def batches(self, size: int) -> Iterator["LabelledText"]:
        """Slices of `size` windows, the last one possibly shorter."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield LabelledText(
                ids_WC=self.ids_WC[rows], mask_WC=self.mask_WC[rows], own_WC=self.own_WC[rows]
            )


def of_domain(windows: Windows, own: int) -> LabelledText:
    """One domain's windows, all their tokens labelled with its own expert."""
    own_WC = torch.full_like(windows.ids_WC, own).masked_fill(windows.mask_WC == 0, -1)
    return LabelledText(ids_WC=windows.ids_WC, mask_WC=windows.mask_WC, own_WC=own_WC)


def stitched(
    data: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    count: int,
    seed: int,
    shortest: int = 32,
    *,
    around: str | None = None,
) -> LabelledText:
    """Make `count` windows that switch domain inside, of the domains' own tokens.

    A window is as long as the longest of `data` and a chain of segments, each of another own
    expert than the one before: consecutive tokens of one document, or whole short documents one
    after another. Lengths are drawn from `shortest` (less in short windows) to half the window;
    the end of the window cuts the last segment. With `around`, every second segment is of that
    domain. A token that starts all windows of all domains (beginning of sequence) stays at the
    start only, since no text switches domain there. Deterministic for a seed, whatever the order
    of the domains. Raises InputError for fewer than two own experts, or a domain without tokens.
    """
    if count < 1 or shortest < 1:
        raise InputError(
            f"count and shortest must be at least 1, but they are {count} and {shortest}"
        )
    start_S = _common_start(data)
    documents = {name: _documents(name, data[name], len(start_S)) for name in sorted(data)}
    _check_experts(documents, own_expert, around)
    length = max(windows.ids_WC.shape[1] for windows in data.values())
    random = np.random.default_rng([seed, *(around or "").encode()])
    chain = _Chain(documents, own_expert, around, shortest, random)
    rows = [chain.window(start_S, length) for _window in range(count)]
    ids_WC = torch.stack([ids_C for ids_C, _own_C in rows])
    return LabelledText(
        ids_WC=ids_WC,
        mask_WC=torch.ones_like(ids_WC),
        own_WC=torch.stack([own_C for _ids_C, own_C in rows]),
    )


def hold_back(data: Mapping[str, Windows]) -> tuple[dict[str, Windows], dict[str, Windows]]:
    """Three quarters of every domain's documents to fit on, and the rest to score on.

    A domain with fewer than four windows is all of both.
    """
    kept, held_back = dict(data), dict(data)
    for domain, windows in data.items():
        early, late = windows.hold_back()
        if len(late) > 0:
            kept[domain], held_back[domain] = early, late
    return kept, held_back


def _common_start(data: Mapping[str, Windows]) -> Tensor:
    first_W = torch.cat([windows.ids_WC[:, 0] for windows in data.values()])
    return first_W[:1] if bool((first_W == first_W[0]).all()) else first_W[:0]


def _documents(name: str, windows: Windows, skipped: int) -> list[Tensor]:
    rows = zip(windows.ids_WC, windows.mask_WC.bool(), strict=True)
    documents = [ids_C[mask_C][skipped:] for ids_C, mask_C in rows]
    documents = [document_S for document_S in documents if len(document_S) > 0]
    if not documents:
        raise InputError(f"expected tokens of {name!r} to stitch, but there are none; give text")
    return documents


def _check_experts(
    documents: Mapping[str, Sequence[Tensor]], own_expert: Mapping[str, int], around: str | None
) -> None:
    if around is not None and around not in documents:
        raise InputError(f"expected text of {around!r}, but there is text of {sorted(documents)}")
    experts = {own_expert[name] for name in documents}
    if len(experts) < 2:
        raise InputError(
            f"expected text of at least two experts to stitch, but there is text of {len(experts)};"
            " give more domains, or do without stitched text (stitch: 0)"
        )


@dataclass(frozen=True)
class _Chain:
    """Draws the segments of windows that switch domain."""

    documents: Mapping[str, Sequence[Tensor]]
    own_expert: Mapping[str, int]
    around: str | None
    shortest: int
    random: np.random.Generator

    def window(self, start_S: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Ids and own experts of one window, (C,) each."""
        longest = max(1, length // 2)
        pieces, owners, room, last = [start_S], [], length - len(start_S), None
        while room > 0:
            last = self._next(last)
            drawn = int(self.random.integers(min(self.shortest, longest), longest + 1))
            size = min(room, drawn)
            pieces.append(self._segment(last, size))
            owners += [self.own_expert[last]] * size
            room -= size
        return torch.cat(pieces), torch.tensor(owners[:1] * len(start_S) + owners)

    def _next(self, last: str | None) -> str:
        if self.around is not None:
            centre = self.own_expert[self.around]
            if last is None:
                starts_inside = bool(self.random.integers(2))
            else:
                starts_inside = self.own_expert[last] != centre
            if starts_inside:
                return self.around
            last = self.around
        others = [
            name
            for name in self.documents
            if last is None or self.own_expert[name] != self.own_expert[last]
        ]
        return others[int(self.random.integers(len(others)))]

    def _segment(self, name: str, size: int) -> Tensor:
        document_S = self._document(name)
        begin = int(self.random.integers(max(len(document_S) - size, 0) + 1))
        pieces = [document_S[begin : begin + size]]
        missing = size - len(pieces[0])
        while missing > 0:
            pieces.append(self._document(name)[:missing])
            missing -= len(pieces[-1])
        return torch.cat(pieces)

    def _document(self, name: str) -> Tensor:
        documents = self.documents[name]
        return documents[int(self.random.integers(len(documents)))]
