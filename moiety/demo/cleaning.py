"""From files as people wrote them to text worth learning: no licences, and prose without markup."""

import re

LICENCE = re.compile(
    r"copyright|\(c\) \d{4}|all rights reserved|spdx-license|licen[sc]ed? (?:under|to|agreement)"
    r"|permission is hereby|redistribution and use|without warrant|the license for"
    r"|\b(?:mit|bsd|apache|gnu|psf)[\w .-]* licen[sc]e",
    re.IGNORECASE,
)
_PYTHON_COMMENT = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)
_CPP_COMMENT = re.compile(r"/\*.*?\*/|(?:^[ \t]*//[^\n]*\n)+", re.MULTILINE | re.DOTALL)

_FENCE = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)
_MARKUP = (
    (re.compile(r"<!--.*?-->|<[^<>\n]{1,200}>", re.DOTALL), ""),
    (re.compile(r"!\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])"), ""),
    (re.compile(r"\[([^\]\[]*)\](?:\([^)]*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"^[ \t]*\.\. .*$", re.MULTILINE), "\n"),
    (re.compile(r"^[ \t]*:[\w-]+:.*$", re.MULTILINE), ""),
    (re.compile(r":[\w:+-]+:`"), "`"),
    (re.compile(r"\[\w+\]_|\|[\w ]+\||`_+"), ""),
    (re.compile(r"https?://\S+"), ""),
    (re.compile(r"\*{1,3}|`+|^[ \t]*>[ \t]?|^#+[ \t].*$", re.MULTILINE), ""),
)
_BULLET = re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)])[ \t]+", re.MULTILINE)
_BREAK = re.compile(r"\n[ \t]*\n")
_WORD = re.compile(r"[A-Za-z']+")
_COMMON = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "be",
        "by",
        "can",
        "for",
        "from",
        "has",
        "if",
        "in",
        "is",
        "it",
        "its",
        "not",
        "of",
        "on",
        "or",
        "that",
        "the",
        "this",
        "to",
        "was",
        "when",
        "which",
        "with",
        "you",
        "your",
    ]
)


def clean_python(text: str) -> str:
    """Python source without comments and lines that state a licence."""
    return _without_licence(text, _PYTHON_COMMENT)


def clean_cpp(text: str) -> str:
    """C or C++ source without comments and lines that state a licence."""
    return _without_licence(text, _CPP_COMMENT)


def _without_licence(text: str, comment: re.Pattern[str]) -> str:
    text = text.replace("\r\n", "\n").expandtabs(4)
    if not LICENCE.search(text):
        return text.strip() + "\n"
    text = comment.sub(lambda match: "" if LICENCE.search(match[0]) else match[0], text)
    lines = (line.rstrip() for line in text.split("\n") if not LICENCE.search(line))
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip() + "\n"


def clean_prose(text: str) -> str:
    """The sentences of a Markdown, reST or plain text, one paragraph a line.

    Code, tables, headings, badges, links, HTML and licence notices are left out.
    """
    text = _FENCE.sub("\n", text.replace("\r\n", "\n"))
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    text = _BULLET.sub("\n\n", text)
    paragraphs = (" ".join(block.split()) for block in _BREAK.split(text))
    kept = [paragraph for paragraph in paragraphs if is_prose(paragraph)]
    return "\n\n".join(kept) + "\n" if kept else ""


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences: mostly letters, everyday words, a full stop."""
    words = [word.lower() for word in _WORD.findall(paragraph)]
    if len(words) < 8 or LICENCE.search(paragraph) or "   " in paragraph:
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    common = sum(word in _COMMON for word in words)
    ends = paragraph.rstrip("\"')").endswith((".", "!", "?", ":", ";"))
    return ends and letters >= 0.88 * len(paragraph) and common >= 0.2 * len(words)
