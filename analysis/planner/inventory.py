"""What a model's weights are: tensors with their part, shape and bytes, none of them loaded."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from moiety.analysis.planner.formats import Format

EXPERTS = "experts"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One tensor, or `copies` alike. `matrix` ones could be packed; those of an expert are `expert`."""

    part: str
    shape: tuple[int, ...]
    kind: str
    stored: int
    matrix: bool = False
    expert: bool = False
    copies: int = 1

    def bytes_in(self, form: Format | None) -> int:
        """Bytes with matrices in a format, or as stored."""
        one = form.bytes_of(self.shape) if form is not None and self.matrix else self.stored
        return one * self.copies


@dataclass(frozen=True, kw_only=True)
class Part:
    """A row of the table of weights: one part of the model in one format."""

    name: str
    kind: str
    weights: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The weights of a model. `active` of `experts` are read for a token; 0 experts: a dense model.

    `caches` counts how many key-value caches it keeps, `config` is that of one decoder.
    """

    name: str
    items: tuple[Item, ...] = field(repr=False)
    config: Any = field(repr=False)
    experts: int = 0
    active: int = 0
    caches: int = 1

    def bytes_in(self, form: Format | None, experts: int | None = None) -> int:
        """All weights with matrices in a format, or as stored; with another count of experts."""
        total = sum(item.bytes_in(form) for item in self.items)
        if experts is None or not self.experts:
            return total
        return total + (experts - self.experts) * self.bytes_of_expert(form)

    def bytes_of_expert(self, form: Format | None) -> int:
        """What one expert adds."""
        held = sum(item.bytes_in(form) for item in self.items if item.expert)
        return held // self.experts if self.experts else 0

    def bytes_read(self, form: Format | None, batch: int) -> float:
        """Bytes of weights that decoding one token of each of `batch` sequences reads.

        Experts: as many different ones as tokens that choose independently and evenly need. An
        embedding table is read a row a token, unless it is the head as well.
        """
        share = 1.0
        if self.experts:
            share -= (1 - self.active / self.experts) ** batch
        tied = not any(item.part == "head" for item in self.items)
        return sum(_read(item, form, share, batch, tied) for item in self.items)

    def parts(self, form: Format | None = None) -> tuple[Part, ...]:
        """Totals of each part and format, largest first."""
        rows: dict[tuple[str, str], list[int]] = {}
        for item in self.items:
            kind = form.name if form is not None and item.matrix else item.kind
            row = rows.setdefault((item.part, kind), [0, 0])
            row[0] += prod(item.shape) * item.copies
            row[1] += item.bytes_in(form)
        parts = [
            Part(name=name, kind=kind, weights=weights, bytes=held)
            for (name, kind), (weights, held) in rows.items()
        ]
        return tuple(sorted(parts, key=lambda part: -part.bytes))


def _read(item: Item, form: Format | None, share: float, batch: int, tied: bool) -> float:
    held = item.bytes_in(form)
    if item.expert:
        return held * share
    if item.part == "embeddings" and not tied and len(item.shape) > 1:
        return min(held, batch * held / item.shape[0])
    return float(held)


def joined(items: Iterable[Item]) -> Iterator[Item]:
    """Items that differ in nothing but their count, as one: models repeat their layers."""
    counts: dict[Item, int] = {}
    for item in items:
        single = Item(**{**vars(item), "copies": 1})
        counts[single] = counts.get(single, 0) + item.copies
    for single, copies in counts.items():
        yield Item(**{**vars(single), "copies": copies})
