"""Mixtures: sparse FFN experts in a stock transformers MoE."""

from moiety.compose.mixture.account import accounting
from moiety.compose.mixture.builder import MixtureBuilder
from moiety.compose.mixture.config import mixture_config, packed_mixture
from moiety.compose.mixture.layout import Layout, check_mixture, layout_of
from moiety.compose.mixture.tensors import mixture_tensors, write_mixture, zero_gates

__all__ = [
    "Layout",
    "MixtureBuilder",
    "accounting",
    "check_mixture",
    "layout_of",
    "mixture_config",
    "mixture_tensors",
    "packed_mixture",
    "write_mixture",
    "zero_gates",
]
