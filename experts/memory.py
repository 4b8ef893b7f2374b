"""Give memory that was freed back to the system."""

import ctypes
import functools
from collections.abc import Callable


def release_freed_memory() -> None:
    """Return what the C library keeps of freed tensors, where it is glibc; elsewhere do nothing.

    Once a mapped block was freed, glibc takes blocks of up to its size, at most 32 MiB, from its
    heap, where freed ones stay with the process: of a model pruned block by block, several blocks.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return None
