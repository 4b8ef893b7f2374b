"""Routed models: every linear of a decoder routed, as sparse deltas on a base or whole."""

from moiety.compose.routed.model import RoutedConfig, RoutedForCausalLM, RoutedLayout

__all__ = ["RoutedConfig", "RoutedForCausalLM", "RoutedLayout"]
