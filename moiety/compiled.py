"""Libraries that are built beside their module where there is a compiler, and called by ctypes."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moiety.errors import InputError

Loaded = TypeVar("Loaded")


def loaded(path: Path, load: Callable[[Path], Loaded], what: str) -> Loaded | None:
    """The library `what` in `path`, as `load` opens it, or None where it was not built.

    InputError where it was built from other sources than these.
    """
    try:
        return load(path) if path.is_file() else None
    except AttributeError as error:
        raise InputError(
            f"expected {what} of this version, but {path} is of another ({error}); "
            "install moiety again (pip install -e .)"
        ) from error
