"""What the analysis hands over: plain data, as JSON and back. Reports read only these.

- `RoutingSummary`: every statistic of one trace (`moiety.analysis.summarise`).
- `Counterfactuals`: losses with experts forced, ablated, left out, swapped.
- `Comparison`: two traces of the same text, and gates swapped between two models.
- `Retention`: losses of dense finetunes, sparse experts and a composite on every domain.

`to_dict(result)` is its JSON (NaN as null), `from_dict(kind, values)` the result again.

Axes: D domains, L routed layers, E experts, A active experts, M documents, B bins of position, in
the order of the result's own names.
"""

from moiety.analysis.results.comparison import Comparison, GateSwap
from moiety.analysis.results.counterfactuals import Change, Counterfactuals, Swap, TokenRegret
from moiety.analysis.results.measured import Interval, LayerMeasure, Measured
from moiety.analysis.results.parts import (
    Cells,
    Coactivation,
    Distances,
    Flow,
    Phase,
    Positions,
    Repetition,
    Vocabulary,
)
from moiety.analysis.results.retention import Retention
from moiety.analysis.results.routing import RoutingSummary
from moiety.analysis.results.serial import from_dict, read_result, to_dict, write_result

__all__ = [
    "Cells",
    "Change",
    "Coactivation",
    "Comparison",
    "Counterfactuals",
    "Distances",
    "Flow",
    "GateSwap",
    "Interval",
    "LayerMeasure",
    "Measured",
    "Phase",
    "Positions",
    "Repetition",
    "Retention",
    "RoutingSummary",
    "Swap",
    "TokenRegret",
    "Vocabulary",
    "from_dict",
    "read_result",
    "to_dict",
    "write_result",
]
