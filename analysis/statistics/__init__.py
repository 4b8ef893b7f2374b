"""What routes say about domains, and whether it is more than chance."""

from moiety.analysis.statistics.summary import RoutingSummary, summarise

__all__ = ["RoutingSummary", "summarise"]
