"""Stages of a build: each is a folder named by the digest of everything it was made from."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moiety.files import digest, new_folder, read_json, write_json
from moiety.progress import SILENT, Progress

RECORD = "stage.json"


class Stages:
    """Runs stages once: a finished stage with the same inputs is used again, never redone.

    An interrupted stage leaves nothing under its name, so the next run starts it again.
    """

    def __init__(self, folder: Path, progress: Progress = SILENT) -> None:
        self.folder = folder
        self.progress = progress
        self.seconds: dict[str, float] = {}

    def run(self, name: str, inputs: Any, make: Callable[[Path], None]) -> Path:
        """The folder of stage `name` for these JSON-like inputs, made by `make(scratch)`."""
        final = self.folder / f"{name}-{digest(inputs)}"
        if (final / RECORD).is_file():
            self.progress.note(f"{name}: already done, used again")
        else:
            self._make(name, inputs, final, make)
        self.seconds[name] = float(read_json(final / RECORD)["seconds"])
        return final

    def _make(self, name: str, inputs: Any, final: Path, make: Callable[[Path], None]) -> None:
        start = time.perf_counter()
        with new_folder(final) as scratch:
            make(scratch)
            seconds = time.perf_counter() - start
            write_json(scratch / RECORD, {"name": name, "inputs": inputs, "seconds": seconds})
        self.progress.note(f"{name}: {seconds:.1f} s")
