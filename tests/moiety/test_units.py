"""Quantities as people read them."""

import pytest

from moiety.units import size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1.534e6, "1.53 MB"), (16e9, "16 GB")],
)
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert size(count) == text
