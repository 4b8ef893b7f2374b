"""How a matrix can be held, and what that takes.

O/I out/in features.
"""

from dataclasses import dataclass
from math import prod

from moiety.experts import packing
from moiety.experts.kernels.weights import DTYPES
from moiety.experts.packing import LARGEST_CODE
from moiety.experts.pattern import Pattern

CODE_BITS = {"int8": 8, "int4": 4}
SCALE_BYTES = 2


@dataclass(frozen=True)
class Format:
    """Values of one type, dense or under a pattern with a mask.

    Integers carry a bf16 scale a row for each 128 columns, dense ones too, as GPTQ and AWQ have
    it without zero points.
    """

    values: str
    pattern: str | None = None

    @property
    def name(self) -> str:
        """As tables show it: `2:4 int8`."""
        return f"{self.pattern} {self.values}" if self.pattern else f"dense {self.values}"

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix (..., O, I)."""
        rows, columns = prod(shape[:-1]), shape[-1]
        if self.pattern:
            return packing.packed_bytes(Pattern.parse(self.pattern), self.values, rows, columns)
        if self.values not in LARGEST_CODE:
            return rows * columns * DTYPES[self.values].itemsize
        scales = SCALE_BYTES * prod(packing.scale_shape(rows, columns))
        return rows * -(-columns * CODE_BITS[self.values] // 8) + scales


FORMATS = tuple(
    Format(values, pattern) for pattern in (None, "2:4") for values in ("bf16", "int8", "int4")
)
