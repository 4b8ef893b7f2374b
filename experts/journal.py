"""What a pruning run has finished, on disk, so that a killed one goes on from there."""

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moiety.errors import OutputError
from moiety.experts.checkpoint import Checkpoint
from moiety.files import check_writable, digest, read_json, sync, write_json


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells one state of a model folder from another without reading its weights."""
    files = sorted({*checkpoint.files.values(), checkpoint.folder / "config.json"})
    status = {file.name: file.stat() for file in files}
    return {
        "folder": str(checkpoint.folder.resolve()),
        "files": {name: [found.st_size, found.st_mtime_ns] for name, found in status.items()},
    }


class Journal:
    """A folder with one file of packed tensors and one of figures for every finished block.

    The folder is named by the content of `plan` (model, text, settings), so another plan never
    finds it. The figures are written last: a block without them was not finished.
    """

    def __init__(self, work: Path, plan: dict[str, Any]) -> None:
        self.work = work
        self.folder = work / digest(plan)
        check_writable(self.folder)
        write_json(self.folder / "plan.json", plan)

    def finished(self, index: int) -> bool:
        """Whether a block's results are here."""
        return self._figures(index).is_file()

    def read(self, index: int) -> tuple[dict[str, Tensor], Any]:
        """A finished block's tensors and figures.

        Raises OutputError, and forgets the block, when its file was damaged since.
        """
        try:
            return load_file(self._tensors(index)), read_json(self._figures(index))
        except (SafetensorError, OSError) as error:
            self._figures(index).unlink()
            raise OutputError(
                f"expected the finished block {index} in {self._tensors(index)}, but: {error}; "
                "run the same command again and it is made again"
            ) from error

    def write(self, index: int, tensors: dict[str, Tensor], figures: Any) -> None:
        """Keep a block's results."""
        scratch = self._tensors(index).with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, scratch, {"format": "pt"})
        sync(scratch)
        scratch.replace(self._tensors(index))
        write_json(self._figures(index), figures)

    def keep(self, name: str, value: Any) -> None:
        """Keep one more result under a name."""
        write_json(self.folder / f"{name}.json", value)

    def kept(self, name: str) -> Any | None:
        """A result kept under a name, if there is one."""
        file = self.folder / f"{name}.json"
        return read_json(file) if file.is_file() else None

    def remove(self) -> None:
        """Forget everything: the run is complete."""
        shutil.rmtree(self.folder)
        if not any(self.work.iterdir()):
            self.work.rmdir()

    def _tensors(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _figures(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"
