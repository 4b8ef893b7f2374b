"""Merges by mergekit's methods, one tensor of each model in memory at a time."""

from moiety.compose.merge.checks import check_merging
from moiety.compose.merge.roles import BASE
from moiety.compose.merge.streaming import (
    everything,
    merge_one,
    merged,
    soup,
    streamed,
    task_arithmetic,
)

__all__ = [
    "BASE",
    "check_merging",
    "everything",
    "merge_one",
    "merged",
    "soup",
    "streamed",
    "task_arithmetic",
]
