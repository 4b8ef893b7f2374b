"""Model cards: the README.md of a composite, as the hub reads it."""

from moiety.compose.card.write import write_card

__all__ = ["write_card"]
