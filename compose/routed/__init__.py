"""Routed models: our own thin class for composites that no stock model can hold."""

from moiety.compose.routed.model import RoutedConfig, RoutedLayout

__all__ = ["RoutedConfig", "RoutedLayout"]
