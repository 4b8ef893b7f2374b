"""How long work reports where it is, without any function knowing who listens.

Library functions take `progress: Progress = SILENT` and call `progress.track(items, "what")`
around their outer loop and `progress.note("...")` for a line worth keeping. The command line
passes a console that draws bars on a terminal and plain lines elsewhere.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """A listener of long work."""

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        """Yield the items while showing how many of `total` are done."""
        ...

    def note(self, message: str) -> None:
        """Show one line that stays."""
        ...


class Silent:
    """The default listener: nothing is shown."""

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        """Yield the items."""
        yield from items

    def note(self, message: str) -> None:
        """Drop the line."""


SILENT = Silent()
