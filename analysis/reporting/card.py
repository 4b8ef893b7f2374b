"""A summary for a notebook: the answer and its few numbers, as HTML without any script."""

from html import escape
from typing import Any

from moiety.analysis.reporting import arguments
from moiety.analysis.reporting.compose import Evidence, of_comparison, of_trace
from moiety.analysis.reporting.document import Document
from moiety.analysis.reporting.words import interval
from moiety.analysis.results import Comparison, Counterfactuals, Retention, RoutingSummary
from moiety.analysis.visible import visible_line

BOX = "border:1px solid currentColor;border-radius:8px;padding:0.8em 1em;max-width:52em"
NUMBER = "font-size:1.5em;font-weight:650"
SOFT = "opacity:0.7;font-size:0.85em"
MOST_FINDINGS = 4


def card(document: Document) -> str:
    """HTML that notebooks show for a result; it follows their colours, and escapes all text."""
    numbers = "".join(
        f'<div style="min-width:9em"><div style="{NUMBER}">{escape(value)}</div>'
        f'<div style="{SOFT}">{escape(meaning)}</div></div>'
        for value, meaning in document.key_figures
    )
    sentences = "".join(
        f"<li>{escape(sentence)}</li>" for sentence in document.findings[:MOST_FINDINGS]
    )
    return (
        f'<div style="{BOX}"><div style="{SOFT}">{escape(document.kicker)}</div>'
        f"<strong>{escape(document.title)}</strong>"
        f'<div style="display:flex;flex-wrap:wrap;gap:1em;margin:0.6em 0">{numbers}</div>'
        f'<ul style="margin:0;padding-left:1.2em">{sentences}</ul></div>'
    )


def card_of(result: Any) -> str:
    """The card of any result."""
    match result:
        case RoutingSummary():
            return card(of_trace(Evidence(summary=result, results={})))
        case Comparison():
            return card(of_comparison(result))
        case Counterfactuals():
            return card(_of_counterfactuals(result))
        case Retention():
            return card(_of_retention(result))
    raise TypeError(f"no card for {type(result).__name__}")


def _of_counterfactuals(found: Counterfactuals) -> Document:
    said = (arguments.regret(found), arguments.removal(found), arguments.redundancy(found))
    numbers = [
        (
            interval(found.document_regret[domain]),
            f"regret in {visible_line(domain)}, nats per token",
        )
        for domain in found.domains[:MOST_FINDINGS]
    ]
    return _small("Counterfactuals", visible_line(found.model), said, numbers)


def _of_retention(found: Retention) -> Document:
    numbers = [
        (interval(found.home), "nats per token at home"),
        (interval(found.away), "nats per token away"),
    ]
    return _small("Retention", "sparse less dense", (arguments.sparsity(found),), numbers)


def _small(
    kicker: str, title: str, findings: tuple[str, ...], numbers: list[tuple[str, str]]
) -> Document:
    return Document(
        kicker=kicker,
        title=title,
        subject=title,
        findings=tuple(sentence for sentence in findings if sentence),
        key_figures=tuple(numbers),
        sections=(),
        methods=(),
    )
