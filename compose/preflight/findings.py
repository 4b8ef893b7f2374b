"""One thing that preflight found: a problem that stops a build, or a note that does not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moiety.errors import InputError


@dataclass(frozen=True)
class Finding:
    """A sentence for the user: what was expected, what came, what to do."""

    text: str
    is_note: bool = False


def note(text: str) -> Finding:
    """What does not stop a build."""
    return Finding(text, is_note=True)


def problems_of(where: str, look: Callable[[], Any]) -> Iterator[Finding]:
    """The InputError that a look at something raises, if any, as a problem."""
    try:
        look()
    except InputError as error:
        yield Finding(f"{where}: {error}")
