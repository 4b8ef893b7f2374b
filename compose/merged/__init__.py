"""Static merges that stay sparse."""

from moiety.compose.merged.builder import MergeBuilder
from moiety.compose.merged.checks import check_merge

__all__ = ["MergeBuilder", "check_merge"]
