"""A summary for a notebook: the answer and its few numbers, as HTML without any script."""

from html import escape

from moiety.analysis.reporting.document import Document

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
