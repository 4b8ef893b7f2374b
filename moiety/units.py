"""Quantities as people read and write them."""

import re

from moiety.errors import InputError


def size(count: float) -> str:
    """Bytes in decimal units: 1.53 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def parse_size(text: str, name: str = "size") -> int:
    """Bytes of `16GB`, `16GiB`, `80 MB` or a bare number of bytes; units without i are decimal.

    Raises InputError that calls it `name` for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b)?\s*", text, re.IGNORECASE)
    if found is None:
        raise InputError(f"{name} must look like 16GB, 16GiB or 80MB, but it is {text!r}")
    number, prefix, binary = found.groups()
    power = "kmgt".index(prefix.lower()) + 1 if prefix else 0
    return round(float(number) * (1024 if binary else 1000) ** power)
