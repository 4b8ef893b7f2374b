"""How much memory this process holds and has held."""

from pathlib import Path


def peak() -> int:
    """Most bytes resident so far.

    Not getrusage's figure, which a process takes over from the one that started it.
    """
    return _read("VmHWM")


def resident() -> int:
    """Bytes resident now."""
    return _read("VmRSS")


def _read(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024
