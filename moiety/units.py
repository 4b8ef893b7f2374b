"""Quantities as people read them."""


def size(count: float) -> str:
    """Bytes in decimal units: 1.53 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
