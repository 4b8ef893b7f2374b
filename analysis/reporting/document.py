"""What a report says, whatever shows it: an answer, then sections of text, tables and figures."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moiety.analysis.tables import Table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart: its `name` on the page, a title, a note on how to read it, and plotly's data.

    `spec` has `data` and `layout` without colours and, where the reader can choose (a layer, a
    pair of layers), `choices` with a `name` and other data each. `summary` says in words what is
    seen, for readers who do not see it.
    """

    name: str
    title: str
    spec: dict[str, Any] = field(repr=False)
    note: str = ""
    summary: str = ""
    choice: str = "Layer"
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """One step of the argument. `details` are tables that only some readers want."""

    name: str
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    details: tuple[Table, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report: the answer first, the evidence, then how it was obtained."""

    kicker: str
    title: str
    subject: str
    findings: tuple[str, ...]
    key_figures: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    methods: tuple[tuple[str, str], ...]

    @property
    def figures(self) -> Iterator[Figure]:
        """Every figure in order."""
        for section in self.sections:
            yield from section.figures

    @property
    def tables(self) -> Iterator[Table]:
        """Every table in order."""
        for section in self.sections:
            yield from (*section.tables, *section.details)
