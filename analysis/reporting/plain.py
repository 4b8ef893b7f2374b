"""A report without a browser: for a terminal, as Markdown, as CSV."""

import csv
import io
from collections.abc import Iterator

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from moiety.analysis.reporting.document import Document
from moiety.analysis.tables import Table
from moiety.analysis.visible import visible_line

SPECIAL = "\\`*_{}[]<>#|~$!&"
FORMULA = ("=", "+", "-", "@")


def to_rich(document: Document) -> Group:
    """For a terminal: the answer, then every section with its tables."""
    parts: list[object] = [
        Text(document.kicker, style="dim"),
        Text(document.title, style="bold"),
        Text(),
        *(Padding(Text(f"• {sentence}"), (0, 0, 0, 1)) for sentence in document.findings),
    ]
    for section in document.sections:
        parts += [Text(), Text(section.title, style="bold underline")]
        parts += [Text(text) for text in section.text]
        parts += [table.to_rich() for table in section.tables]
    parts += [Text(), Text("Methods and caveats", style="bold underline")]
    parts += [Text.assemble((f"{name}. ", "bold"), told) for name, told in document.methods]
    return Group(*parts)  # pyright: ignore[reportArgumentType]


def to_markdown(document: Document) -> str:
    """GitHub's Markdown, with tables; names of a trace are escaped."""
    return "\n".join(_markdown(document)).rstrip() + "\n"


def _markdown(document: Document) -> Iterator[str]:
    yield from (f"# {_safe(document.title)}", "", _safe(document.kicker), "")
    yield from (f"- {_safe(sentence)}" for sentence in document.findings)
    for section in document.sections:
        yield from ("", f"## {_safe(section.title)}", "")
        for text in section.text:
            yield from (_safe(text), "")
        for table in (*section.tables, *section.details):
            yield from _markdown_table(table)
    yield from ("", "## Methods and caveats", "")
    yield from (f"- **{_safe(name)}.** {_safe(told)}" for name, told in document.methods)


def _markdown_table(table: Table) -> Iterator[str]:
    yield from (f"**{_safe(table.title)}**", "")
    yield "| " + " | ".join(_safe(name) for name in table.columns) + " |"
    yield "|---" + "|---:" * (len(table.columns) - 1) + "|"
    yield from ("| " + " | ".join(_safe(cell) for cell in row) + " |" for row in table.rows)
    yield ""
    if table.note:
        yield from (_safe(table.note), "")


def _safe(text: str) -> str:
    return "".join(f"\\{char}" if char in SPECIAL else char for char in visible_line(text))


def to_csv(document: Document) -> str:
    """Every cell of every table: columns table, row, column, value.

    A cell that a spreadsheet would take for a formula gets an apostrophe in front, unless it is a
    number.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("table", "row", "column", "value"))
    for table in document.tables:
        for row in table.rows:
            for column, value in zip(table.columns[1:], row[1:], strict=True):
                writer.writerow([_cell(one) for one in (table.title, row[0], column, value)])
    return out.getvalue()


def _cell(text: str) -> str:
    shown = visible_line(text)
    return f"'{shown}" if shown.startswith(FORMULA) and not _is_number(shown) else shown


def _is_number(text: str) -> bool:
    head = text.split(" ")[0].removesuffix("%").replace(",", "")
    try:
        float(head)
    except ValueError:
        return False
    return True
