"""Interleaved timing: every contender runs once a round, so that drift hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

Contenders = Mapping[str, Callable[[], object]]


def interleaved(contenders: Contenders, rounds: int = 15, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of each contender over `rounds` rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(seconds: Mapping[str, float], ours: str) -> dict[str, float]:
    """Each peer's time over ours: above 1 where we are faster."""
    return {name: value / seconds[ours] for name, value in seconds.items() if name != ours}
