"""Numbers in sentences."""

from collections.abc import Mapping

from moiety.analysis.results import Interval, Measured
from moiety.analysis.visible import visible_line

LEVEL = 0.05


def interval(found: Interval, form: str = "{:.3f}") -> str:
    """`0.12 [0.08, 0.15]`: the estimate and its 95 % interval, where there is one."""
    value = form.format(found.value)
    if found.low != found.low or found.high != found.high:
        return value
    return f"{value} [{form.format(found.low)}, {form.format(found.high)}]"


def measured(found: Measured, form: str = "{:.3f}") -> str:
    """As `interval`, the value corrected for bias, or as counted where that is not known."""
    value = found.observed if found.corrected != found.corrected else found.corrected
    return interval(Interval(value=value, low=found.low, high=found.high), form)


def p_value(value: float) -> str:
    """`p = 0.012`, or that there is none."""
    return "p unknown" if value != value else f"p = {value:.2g}"


def extremes(values: Mapping[str, Interval]) -> tuple[str, str]:
    """The names with the least and the largest estimate."""
    return (
        min(values, key=lambda name: values[name].value),
        max(values, key=lambda name: values[name].value),
    )


def mean(values: Mapping[str, Interval]) -> float:
    """The mean of the estimates."""
    return sum(one.value for one in values.values()) / len(values)


def quoted(name: str) -> str:
    """A name from a trace, safe in a line of text."""
    return visible_line(name)
