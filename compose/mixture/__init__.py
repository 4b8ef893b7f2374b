"""Mixtures: sparse FFN experts in a stock transformers MoE."""

from moiety.compose.mixture.builder import MixtureBuilder

__all__ = ["MixtureBuilder"]
