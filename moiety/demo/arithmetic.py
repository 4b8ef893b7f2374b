"""Generated arithmetic: documents of worked problems, and exact-match prompts.

A problem is a line such as `7 + 12 = 19`. One problem in six, chosen by a hash of its text, is
set aside: held-out documents are made of those alone, and training and calibration documents
never hold one (they may hold the same sum with its operands exchanged). Exact-match prompts ask
the others, in company that no training document has: models of this size learn these tables
before they learn to calculate, so the accuracy says what a model knows and still knows once it
is pruned, merged or routed.
"""

import random
from functools import cache

from moiety.demo.sources import hash_order
from moiety.errors import InputError

_LEVELS = (("+", 10, 10), ("-", 10, 10), ("*", 10, 10), ("+", 20, 20), ("-", 20, 20))
_LINES = 24
_WORKED = 6
_SET_ASIDE = 6


@cache
def problems(seed: int, set_aside: bool) -> tuple[tuple[str, ...], ...]:
    """The problems of every level, either those set aside or the others."""
    levels = []
    for sign, first, second in _LEVELS:
        pairs = ((a, b) for a in range(first) for b in range(second) if sign != "-" or a >= b)
        lines = (line(a, sign, b) for a, b in pairs if _is_set_aside(seed, a, sign, b) == set_aside)
        levels.append(tuple(lines))
    return tuple(levels)


def line(a: int, sign: str, b: int) -> str:
    """One worked problem."""
    answer = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return f"{a} {sign} {b} = {answer}"


def _is_set_aside(seed: int, a: int, sign: str, b: int) -> bool:
    return int(hash_order(seed, f"{a} {sign} {b}")[:4], 16) % _SET_ASIDE == 0


def arithmetic_documents(
    generator: random.Random, *, seed: int, characters: int, set_aside: bool
) -> list[str]:
    """Generate documents of problems, of one level or of all, `characters` in all."""
    levels = problems(seed, set_aside)
    everything = [problem for level in levels for problem in level]
    documents, size = [], 0
    while size < characters:
        pool = everything if generator.random() < 0.5 else generator.choice(levels)
        lines = generator.sample(pool, min(_LINES, len(pool)))
        documents.append("\n".join(lines) + "\n")
        size += len(documents[-1])
    return documents


def exact_match_problems(
    generator: random.Random, *, seed: int, count: int
) -> list[dict[str, str]]:
    """Make `count` different prompts, each some worked lines and one problem without its answer.

    Raises InputError when there are fewer problems than that.
    """
    everything = sorted({problem for level in problems(seed, False) for problem in level})
    if count > len(everything):
        raise InputError(
            f"expected at most {len(everything)} arithmetic problems, but {count} are asked for; "
            "ask for fewer"
        )
    return [_prompt(generator, everything, asked) for asked in generator.sample(everything, count)]


def _prompt(generator: random.Random, everything: list[str], asked: str) -> dict[str, str]:
    others = [problem for problem in everything if problem != asked]
    question, answer = asked.rsplit(" = ", 1)
    worked = generator.sample(others, _WORKED)
    return {"prompt": "\n".join([*worked, f"{question} ="]), "answer": f" {answer}"}
