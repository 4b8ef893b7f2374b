"""Reading a composite: measure it, trace its routes, test them, report them."""

from moiety.analysis.comparison import compare, gate_swap
from moiety.analysis.counterfactuals import counterfactuals
from moiety.analysis.evaluate import evaluate
from moiety.analysis.planner import plan
from moiety.analysis.report import report
from moiety.analysis.retention import retention
from moiety.analysis.statistics import summarise
from moiety.analysis.trace import Trace, import_routes, trace

__all__ = [
    "Trace",
    "compare",
    "counterfactuals",
    "evaluate",
    "gate_swap",
    "import_routes",
    "plan",
    "report",
    "retention",
    "summarise",
    "trace",
]
