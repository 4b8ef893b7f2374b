"""Reading a composite: measure it, trace its routes, test them, report them."""

from moiety.analysis.evaluate import evaluate
from moiety.analysis.report import report
from moiety.analysis.statistics import summarise
from moiety.analysis.trace import Trace, trace

__all__ = ["Trace", "evaluate", "report", "summarise", "trace"]
