"""Two checkpoints or routers on the same text."""

from moiety.analysis.comparison.gates import gate_swap, with_gate_swap
from moiety.analysis.comparison.routes import compare

__all__ = ["compare", "gate_swap", "with_gate_swap"]
