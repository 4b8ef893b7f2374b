"""What routes say about domains, and whether it is more than chance."""

from moiety.analysis.results.routing import RoutingSummary
from moiety.analysis.statistics.summary import own_experts, summarise

__all__ = ["RoutingSummary", "own_experts", "summarise"]
