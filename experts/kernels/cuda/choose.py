"""How the work is cut: measured on an H100 (`python -m benchmarks.gpu_tune`), for any card.

The table's rows are the fastest of that sweep; how often the columns are split follows from the
number of multiprocessors.
"""

from dataclasses import dataclass

SPAN = 256
_ROWS_A_PROCESSOR = 128
MOST_TOKENS = 64


@dataclass(frozen=True)
class Choice:
    """Rows and tokens of a program, its warps, sets of warps that share columns, loads in flight."""

    rows: int
    tokens: int
    warps: int
    sharing: int
    stages: int


# (values' bits, gated, tokens a program) -> choice.
_TABLE = {
    (16, True, 8): Choice(32, 8, 4, 2, 3),
    (16, True, 16): Choice(128, 16, 4, 1, 3),
    (16, True, 32): Choice(128, 32, 4, 1, 3),
    (16, True, 64): Choice(64, 64, 2, 1, 2),
    (16, False, 8): Choice(64, 8, 2, 1, 3),
    (16, False, 16): Choice(128, 16, 4, 1, 3),
    (16, False, 32): Choice(128, 32, 4, 1, 3),
    (16, False, 64): Choice(128, 64, 4, 1, 3),
    (8, True, 8): Choice(64, 8, 2, 1, 3),
    (8, True, 16): Choice(64, 16, 2, 1, 3),
    (8, True, 32): Choice(128, 32, 4, 1, 3),
    (8, True, 64): Choice(128, 64, 8, 1, 3),
    (8, False, 8): Choice(32, 8, 2, 1, 3),
    (8, False, 16): Choice(64, 16, 2, 1, 3),
    (8, False, 32): Choice(128, 32, 4, 1, 4),
    (8, False, 64): Choice(128, 64, 8, 1, 3),
    (4, True, 8): Choice(64, 8, 2, 1, 3),
    (4, True, 16): Choice(64, 16, 2, 1, 3),
    (4, True, 32): Choice(128, 32, 4, 1, 3),
    (4, True, 64): Choice(64, 64, 4, 1, 3),
    (4, False, 8): Choice(64, 8, 2, 1, 4),
    (4, False, 16): Choice(64, 16, 4, 1, 3),
    (4, False, 32): Choice(128, 32, 4, 1, 4),
    (4, False, 64): Choice(64, 64, 4, 1, 3),
}


def tokens_of_block(tokens: float) -> int:
    """Tokens that a program takes when an expert has about so many."""
    return next((size for size in (8, 16, 32) if tokens <= size), MOST_TOKENS)


def choose(bits: int, gated: bool, tokens: int) -> Choice:
    """How to cut a product whose programs take `tokens` tokens each."""
    return _TABLE[bits, gated, tokens]


def splits(choice: Choice, programs: int, columns: int, processors: int) -> int:
    """Parts the columns are summed in, so that every multiprocessor has rows enough."""
    spans = -(-columns // (SPAN * choice.sharing))
    wanted = _ROWS_A_PROCESSOR * processors / (programs * choice.rows)
    if wanted <= 1:
        return 1
    most = min(spans, max(1, round(wanted)))
    divisors = [part for part in range(1, most + 1) if spans % part == 0]
    return divisors[-1] if 2 * divisors[-1] > most else most
