"""A number with what it is worth: its interval, and what chance alone gives."""

from dataclasses import dataclass

from moiety.analysis.results.serial import CONFIG, Number


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval, from resampled documents."""

    __pydantic_config__ = CONFIG
    value: Number
    low: Number
    high: Number


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One statistic of routes against domains.

    `observed` as counted, biased upwards in small samples. `corrected` without that bias (delete-
    a-group jackknife over documents), `low` to `high` its 95 % bootstrap interval over documents;
    NaN where nothing is resampled. `mean` and `quantile_95` describe the statistic when domain
    labels are permuted over documents, `p_value` is (1 + permutations at least as large) / (1 +
    permutations), `adjusted_p` that after Benjamini and Hochberg over the layers.
    """

    __pydantic_config__ = CONFIG
    observed: Number
    corrected: Number
    low: Number
    high: Number
    mean: Number
    quantile_95: Number
    p_value: Number
    adjusted_p: Number


@dataclass(frozen=True, kw_only=True)
class LayerMeasure:
    """A statistic of every layer by itself, and `overall`, the mean over layers."""

    __pydantic_config__ = CONFIG
    overall: Measured
    layers: tuple[Measured, ...]
