"""Interleaved timing: every contender runs once a round, so that drift hits all alike."""

import random
import statistics
import time
from collections.abc import Callable, Mapping

Contenders = Mapping[str, Callable[[], object]]


def interleaved(
    contenders: Contenders, rounds: int = 15, warm_up: int = 3, budget: float | None = None
) -> dict[str, float]:
    """Median seconds of each contender over `rounds` rounds.

    With `budget`, rounds stop after so many seconds, but not before the fifth. Each round draws its
    order: what a contender finds in the caches depends on whom it follows.
    """
    order, draw = list(contenders), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    for turn in range(warm_up + rounds):
        late = budget is not None and time.perf_counter() - begin > budget
        if late and min(map(len, seconds.values())) >= 5:
            break
        draw.shuffle(order)
        for name in order:
            run = contenders[name]
            start = time.perf_counter()
            run()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(seconds: Mapping[str, float], ours: str) -> dict[str, float]:
    """Each peer's time over ours: above 1 where we are faster."""
    return {name: value / seconds[ours] for name, value in seconds.items() if name != ours}
