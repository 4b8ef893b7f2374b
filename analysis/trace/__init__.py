"""Routes of labelled text: record them, keep them on disk, read them."""

from moiety.analysis.trace.engines import Shape, import_routes
from moiety.analysis.trace.file import Header, Trace
from moiety.analysis.trace.record import trace, trace_model

__all__ = ["Header", "Shape", "Trace", "import_routes", "trace", "trace_model"]
