"""One expert: its pattern, how it is pruned, recovered, packed and multiplied."""

from moiety.experts.delta import merge_delta, open_delta
from moiety.experts.export import export_dense
from moiety.experts.inspect import inspect
from moiety.experts.many import Finetune, prune_many
from moiety.experts.packing import Packed, pack
from moiety.experts.pattern import Pattern
from moiety.experts.prune import PruneReport, prune
from moiety.experts.recovery import BlockRecovery, recover
from moiety.experts.rescue import rescue
from moiety.experts.settings import PruneSettings
from moiety.experts.width import WidthSettings, prune_width

__all__ = [
    "BlockRecovery",
    "Finetune",
    "Packed",
    "Pattern",
    "PruneReport",
    "PruneSettings",
    "WidthSettings",
    "export_dense",
    "inspect",
    "merge_delta",
    "open_delta",
    "pack",
    "prune",
    "prune_many",
    "prune_width",
    "recover",
    "rescue",
]
