"""The text that routers are judged on: domains, a switch inside a document, a foreign domain.

W windows, C context length, S tokens of half a window, N segments.
"""

import itertools
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moiety.analysis.controls import heldout_windows
from moiety.compose.recipe import Recipe
from moiety.errors import InputError
from moiety.routers.labelled import LabelledText, of_domain
from moiety.text import Windows, token_windows

REPEATS = 4
LINES = 80


@dataclass(frozen=True)
class Texts:
    """Held-out text of every domain, text that switches between them, and text of none of them."""

    heldout: dict[str, LabelledText]
    switched: LabelledText
    foreign: LabelledText

    @property
    def half(self) -> int:
        """The token at which switched text switches."""
        return self.switched.ids_WC.shape[1] // 2


def read_texts(recipe: Recipe, tokenizer: Any, repeats: int = REPEATS) -> Texts:
    """All text for the experts of a recipe, `recipe.evaluate.windows` windows a domain."""
    heldout = heldout_windows(recipe, tokenizer)
    foreign = token_windows(
        tokenizer, character_tables(), recipe.context_length, recipe.evaluate.windows
    )
    return Texts(
        {name: of_domain(windows, own) for own, (name, windows) in enumerate(heldout.items())},
        switches(heldout, recipe.context_length, repeats),
        of_domain(foreign, -1),
    )


def character_tables() -> list[str]:
    """CSV of Unicode's characters, from the standard library: no demo domain looks like it."""
    lines = [
        f"{code:04X},{unicodedata.name(chr(code))},{unicodedata.category(chr(code))},"
        f"{unicodedata.bidirectional(chr(code))},{unicodedata.east_asian_width(chr(code))}"
        for code in range(0x20, 0x2E80)
        if unicodedata.name(chr(code), "")
    ]
    return ["\n".join(lines[start : start + LINES]) for start in range(0, len(lines), LINES)]


def switches(data: Mapping[str, Windows], length: int, repeats: int) -> LabelledText:
    """`repeats` windows for every ordered pair of domains: half of one, then half of the other.

    Own experts are the domains' places in `data`. The token that starts every document stands at
    the start only, since no text announces that it changes. Raises InputError for a domain with
    less than a window of text.
    """
    half = length // 2
    start_S = _start(data)
    segments = {name: _segments(name, windows, start_S, half) for name, windows in data.items()}
    ids, own = [], []
    for pair in itertools.permutations(range(len(data)), 2):
        first_NS, second_NS = (list(segments.values())[domain] for domain in pair)
        for repeat in range(repeats):
            first_S = first_NS[2 * repeat % len(first_NS)]
            second_S = second_NS[(2 * repeat + 1) % len(second_NS)]
            ids.append(torch.cat([start_S, first_S[: half - len(start_S)], second_S]))
            own.append(torch.tensor(pair).repeat_interleave(half))
    ids_WC = torch.stack(ids)
    return LabelledText(ids_WC=ids_WC, mask_WC=torch.ones_like(ids_WC), own_WC=torch.stack(own))


def _start(data: Mapping[str, Windows]) -> Tensor:
    first_W = torch.cat([windows.ids_WC[:, 0] for windows in data.values()])
    return first_W[:1] if bool((first_W == first_W[0]).all()) else first_W[:0]


def _segments(name: str, windows: Windows, start_S: Tensor, half: int) -> Tensor:
    """A domain's tokens one after another, without what starts its documents, in halves."""
    kept_WC = windows.mask_WC.bool().clone()
    kept_WC[:, : len(start_S)] = False
    stream_T = windows.ids_WC[kept_WC]
    if len(stream_T) < 2 * half:
        raise InputError(
            f"expected at least {2 * half} held-out tokens of {name}, but there are "
            f"{len(stream_T)}; give more text or a shorter context"
        )
    return stream_T[: len(stream_T) // half * half].view(-1, half)
