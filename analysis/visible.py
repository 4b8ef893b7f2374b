"""Show text that nobody vouches for: what would steer a terminal or a browser becomes visible."""

import unicodedata

JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
HIDDEN = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}
KEPT = "\n\t" + JOINERS
PICTURES = 0x2400
DELETE = 0x7F


def visible(text: str, kept: str = KEPT) -> str:
    """Replace control, format, bidirectional and unassigned characters by signs for them.

    C0 controls become their Unicode pictures (NUL is ␀), others their code point (⟨U+202E⟩).
    Characters in `kept` stay: by default newline, tab, and the joiners that scripts and emoji need.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _sign(char) if unicodedata.category(char) in HIDDEN and char not in kept else char
        for char in text
    )


def visible_line(text: str) -> str:
    """As `visible`, for a place that holds one line."""
    return visible(text, kept=JOINERS)


def _sign(char: str) -> str:
    code = ord(char)
    if code < ord(" "):
        return chr(PICTURES + code)
    if code == DELETE:
        return "\N{SYMBOL FOR DELETE}"
    return f"⟨U+{code:04X}⟩"
