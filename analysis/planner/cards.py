"""Memory and bandwidth of well-known cards, and of any other by its size.

Memory is the total that the driver reports, bandwidth the vendor's data sheet's.
"""

from dataclasses import dataclass

from moiety.errors import InputError
from moiety.units import parse_size

MIB = 2**20
_CARDS = {
    "t4": (15360, 320),
    "l4": (23034, 300),
    "a10": (23028, 600),
    "rtx3060": (12288, 360),
    "rtx3090": (24576, 936),
    "rtx4060ti": (16380, 288),
    "rtx4070tisuper": (16376, 672),
    "rtx4080": (16376, 717),
    "rtx4090": (24564, 1008),
    "rtx5060ti": (16311, 448),
    "rtx5070ti": (16303, 896),
    "rtx5080": (16303, 960),
    "rtx5090": (32607, 1792),
    "a6000": (49140, 768),
    "rtx6000ada": (49140, 960),
    "l40s": (46068, 864),
    "a100-40": (40960, 1555),
    "a100-80": (81920, 2039),
    "h100": (81559, 3350),
    "h200": (143771, 4800),
}
"""Name: MiB of memory, GB a second. `rtx4060ti` and `rtx5060ti` are the 16 GB ones."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A device: its memory in bytes and, where known, the bytes it reads in a second."""

    name: str
    memory: int
    bandwidth: float | None = None


def find_card(text: str, bandwidth: str | None = None) -> Card:
    """A card by name (`rtx4090`) or by its memory (`16GB`); `bandwidth` as `672GB/s`.

    Raises InputError for an unknown name or a quantity that cannot be read.
    """
    given = None if bandwidth is None else _bandwidth(bandwidth)
    name = text.lower().replace(" ", "").replace("_", "-")
    if name in _CARDS:
        memory, speed = _CARDS[name]
        return Card(name=name, memory=memory * MIB, bandwidth=given or speed * 1e9)
    if not text[:1].isdigit():
        raise InputError(
            f"gpu must be a size such as 16GB or one of {', '.join(_CARDS)}, but it is {text!r}"
        )
    return Card(name=text, memory=parse_size(text, "gpu"), bandwidth=given)


def _bandwidth(text: str) -> float:
    return float(parse_size(text.lower().removesuffix("/s"), "bandwidth"))
