"""Reports of traces: a page, Markdown, JSON or CSV by the name of the file; a terminal; a notebook."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Group

from moiety.analysis.comparison import compare, with_gate_swap
from moiety.analysis.reporting import plain
from moiety.analysis.reporting.card import card
from moiety.analysis.reporting.compose import Evidence, of_comparison, of_trace
from moiety.analysis.reporting.document import Document
from moiety.analysis.reporting.page import page
from moiety.analysis.results import (
    Comparison,
    Counterfactuals,
    GateSwap,
    Retention,
    read_result,
    to_dict,
)
from moiety.analysis.samples import read_samples
from moiety.analysis.statistics import summarise
from moiety.analysis.trace.file import Trace
from moiety.analysis.view import token_view
from moiety.errors import InputError, OutputError
from moiety.files import check_writable, write_text

KINDS = (".html", ".md", ".json", ".csv")
COUNTERFACTUALS, RETENTION = "counterfactuals.json", "retention.json"
GATE_SWAP = "gate_swap.json"
VIEW_TOKENS = 20_000
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reported:
    """A report in memory: what it says, its numbers as JSON values, and its page.

    A notebook shows it as a card.
    """

    document: Document
    values: dict[str, Any] = field(repr=False)
    trace: Trace | None = field(default=None, repr=False)
    evidence: Evidence | None = field(default=None, repr=False)

    @classmethod
    def read(
        cls,
        trace: str | Path,
        results: Mapping[str, Any] | None = None,
        *,
        own_expert: Mapping[str, str | int] | None = None,
        counterfactuals: Counterfactuals | str | Path | None = None,
        retention: Retention | str | Path | None = None,
    ) -> "Reported":
        """The report of a trace and of what else is known; see `report`."""
        if results is not None and not isinstance(results, Mapping):
            raise InputError(
                f"expected results to be a mapping of measures, but it is {type(results).__name__}"
            )
        opened, folder = Trace.open(Path(trace)), Path(trace)
        evidence = Evidence(
            summary=summarise(opened, own_expert),
            results=results or {},
            counterfactuals=_found(Counterfactuals, counterfactuals, folder / COUNTERFACTUALS),
            retention=_found(Retention, retention, folder / RETENTION),
        )
        return cls(of_trace(evidence), _values(evidence), opened, evidence)

    @classmethod
    def compare(
        cls,
        first: str | Path,
        second: str | Path,
        gate_swap: GateSwap | str | Path | None = None,
    ) -> "Reported":
        """The report of two traces of the same text, and of their models' gates exchanged.

        `gate_swap` is by default `gate_swap.json` in the first trace's folder.
        """
        found = compare(Trace.open(Path(first)), Trace.open(Path(second)))
        swap = _found(GateSwap, gate_swap, Path(first) / GATE_SWAP)
        return cls.of(found if swap is None else with_gate_swap(found, swap))

    @classmethod
    def of(cls, found: Comparison) -> "Reported":
        """The report of a comparison."""
        return cls(of_comparison(found), to_dict(found))

    def write(self, out: str | Path, max_view_tokens: int = VIEW_TOKENS) -> Path:
        """Write the file `out` in the form that its ending says; see `report`."""
        if max_view_tokens < 1:
            raise InputError(f"max_view_tokens must be at least 1, but it is {max_view_tokens}")
        out = check_form(out)
        forms: dict[str, Callable[[], str]] = {
            ".html": lambda: self.html(max_view_tokens),
            ".md": lambda: plain.to_markdown(self.document),
            ".csv": lambda: plain.to_csv(self.document),
            ".json": lambda: json.dumps(self.values, indent=2, ensure_ascii=False) + "\n",
        }
        text = forms[out.suffix]()
        check_writable(out.parent)
        write_text(out, text)
        return out

    def html(self, max_view_tokens: int = VIEW_TOKENS) -> str:
        """The whole page."""
        if self.trace is None or self.evidence is None:
            return page(self.document)
        view = token_view(self.trace, self.evidence.summary, max_view_tokens)
        return page(self.document, view, read_samples(self.evidence.results))

    def to_rich(self) -> Group:
        """For a terminal."""
        return plain.to_rich(self.document)

    def _repr_html_(self) -> str:
        return card(self.document)


def report(
    trace: str | Path,
    out: str | Path,
    results: Mapping[str, Any] | None = None,
    *,
    other: str | Path | None = None,
    own_expert: Mapping[str, str | int] | None = None,
    counterfactuals: Counterfactuals | str | Path | None = None,
    retention: Retention | str | Path | None = None,
    gate_swap: GateSwap | str | Path | None = None,
    max_view_tokens: int = VIEW_TOKENS,
) -> Path:
    """Write the report of a trace to the file `out` and give its path.

    The ending of `out` says the form: .html, .md, .json or .csv. `results` are the measured
    losses, bytes and speeds (the demo's `results.json`). `counterfactuals` and `retention` are
    results or their files, by default `counterfactuals.json` and `retention.json` in the trace's
    folder; what is absent is left out. `own_expert` as in `summarise`. The token view holds at
    most `max_view_tokens` tokens, shared equally by the domains. With `other`, a second trace of the
    same text, the report is the comparison of the two and nothing else, with `gate_swap` (a result
    or its file, by default `gate_swap.json` in the first trace's folder) where it is known.

    Raises InputError when a trace or a result cannot be used, OutputError when `out` cannot be
    written.
    """
    if max_view_tokens < 1:
        raise InputError(f"max_view_tokens must be at least 1, but it is {max_view_tokens}")
    check_form(out)
    if other is not None:
        return Reported.compare(trace, other, gate_swap).write(out)
    made = Reported.read(
        trace,
        results,
        own_expert=own_expert,
        counterfactuals=counterfactuals,
        retention=retention,
    )
    return made.write(out, max_view_tokens)


def check_form(out: str | Path) -> Path:
    """The file that a report is to be written to; raises when its ending names no form."""
    out = Path(out)
    if out.is_dir():
        raise OutputError(f"expected {out} to be a file to write, but it is a folder; add a name")
    if out.suffix not in KINDS:
        raise InputError(f"expected a report to end in {', '.join(KINDS)}, but it is {out.name}")
    return out


def _found(kind: type[Result], given: Any, place: Path) -> Result | None:
    if isinstance(given, kind):
        return given
    if given is None and not place.is_file():
        return None
    return read_result(kind, place if given is None else Path(given))


def _values(evidence: Evidence) -> dict[str, Any]:
    parts = {"counterfactuals": evidence.counterfactuals, "retention": evidence.retention}
    known = {name: to_dict(part) for name, part in parts.items() if part is not None}
    return {"routing": to_dict(evidence.summary), "results": dict(evidence.results), **known}
