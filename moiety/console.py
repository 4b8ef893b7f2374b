"""What a person sees: progress bars on a terminal, plain lines elsewhere, tables, errors."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")
QUIET_SECONDS = 15.0
PIPE_WIDTH = 120


class ConsoleProgress:
    """Shows long work on stderr: a bar with an ETA on a terminal, a line now and then in a log."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars: Progress | None = None

    def note(self, message: str) -> None:
        """One line that stays."""
        self.console.print(escape(message), highlight=False, soft_wrap=True)

    def track(
        self, items: Iterable[Item], description: str, total: int | None = None
    ) -> Iterator[Item]:
        """Yield the items while showing how many of `total` are done."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # pyright: ignore[reportArgumentType]
        if self.console.is_terminal:
            yield from self._bar(items, description, total)
        else:
            yield from self._lines(items, description, total)

    def _bar(self, items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
        outermost = self._bars is None
        bars = self._bars or Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._bars = bars
        if outermost:
            bars.start()
        task = bars.add_task(escape(description), total=total)
        try:
            for item in items:
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None

    def _lines(self, items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
        start = shown = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - shown >= QUIET_SECONDS and done != total:
                self.note(_line(description, done, total, now - start))
                shown = now


def _line(description: str, done: int, total: int | None, seconds: float) -> str:
    if total is None:
        return f"{description}: {done} done in {seconds:.0f} s"
    left = seconds / done * (total - done)
    return f"{description}: {done} of {total}, about {left:.0f} s left"


def results_console() -> Console:
    """Where results go: stdout, wide enough for tables when it is a file or a pipe."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def show_error(message: str) -> None:
    """One paragraph on stderr."""
    console = Console(stderr=True)
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
