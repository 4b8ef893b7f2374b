"""Markdown out of text that nobody vouches for: names, licences, whatever a README says."""

import html
import re
import unicodedata
from collections.abc import Sequence

SPECIAL = re.compile(r"([\\`*_\[\]()|~#!$])")
LINK = re.compile(r"(?i)(www)\.|(https?|ftp|mailto|xmpp):")
BREAKS = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}
ABSENT = "\N{EN DASH}"


def plain(text: object) -> str:
    """One line that shows `text` literally: no markup, no links, no hidden characters."""
    line = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(char) in BREAKS else char
        for char in str(text)
    )
    marked = SPECIAL.sub(r"\\\1", html.escape(line, quote=False))
    return LINK.sub(lambda found: found[0][:-1] + ("&#46;" if found[1] else "&#58;"), marked)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; columns of numbers are aligned to the right, cells are shown literally."""
    cells = [[plain(cell) for cell in row] for row in rows]
    sides = [
        "---:" if all(map(_is_number, column)) else "---" for column in zip(*cells, strict=True)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(columns), sides, *cells])


def _is_number(cell: str) -> bool:
    return cell == ABSENT or cell[:1].isdigit()


def fenced(text: str, language: str) -> str:
    """A code block that `text` cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def section(title: str, *parts: str) -> str:
    """A heading and its paragraphs."""
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])
