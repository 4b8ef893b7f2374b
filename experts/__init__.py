"""One expert: its pattern, how it is pruned, how it is packed and multiplied."""

from moiety.experts.packing import Packed, pack
from moiety.experts.pattern import Pattern
from moiety.experts.prune import PruneReport, PruneSettings, prune

__all__ = ["Packed", "Pattern", "PruneReport", "PruneSettings", "pack", "prune"]
