"""Routes of labelled text: record them, keep them on disk, read them."""

from moiety.analysis.trace.file import Header, Trace
from moiety.analysis.trace.record import trace, trace_model

__all__ = ["Header", "Trace", "trace", "trace_model"]
