"""A trace while it is made: parts on disk, so that a killed run goes on where it was."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet

from moiety.analysis.trace.file import schema
from moiety.analysis.trace.writer import ROWS_A_GROUP, RouteWriter
from moiety.errors import InputError
from moiety.files import read_json, sync, write_json

SECONDS_A_PART = 30.0
KEY = "key.json"


class Parts:
    """Finished batches of a trace in a folder, each part a Parquet file of some of them.

    `done` batches are there already. `key` says what is traced: parts of another key are removed.
    Without one nothing will go on from here, so nothing is flushed to the disk.
    """

    def __init__(self, folder: Path, key: Any) -> None:
        self.folder = folder
        self._key = {"trace": key}
        self._lasting = key is not None
        self._prepare()
        self._files = _contiguous(folder)
        self.done = self._files[-1][1] if self._files else 0

    def _prepare(self) -> None:
        if self.folder.is_dir() and _key_of(self.folder) != self._key:
            shutil.rmtree(self.folder)
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            if self._lasting:
                write_json(self.folder / KEY, self._key)

    def extend(self, batches: Iterator[tuple[str, dict[str, Any]]]) -> None:
        """Write more batches, `(domain, columns)` each, the first of them number `done`."""
        number, more = self.done, True
        while more:
            with self._part(number) as (writer, finish):
                begin, rows = time.monotonic(), 0
                more = False
                for domain, columns in batches:
                    writer.add(domain, columns)
                    number, rows = number + 1, rows + len(columns["text"])
                    if rows >= ROWS_A_GROUP or time.monotonic() - begin > SECONDS_A_PART:
                        more = True
                        break
                finish(number)
        self.done = number

    @contextmanager
    def _part(self, start: int) -> Iterator[tuple[RouteWriter, Any]]:
        scratch = self.folder / "unfinished.parquet"
        stops: list[int] = []
        with RouteWriter(scratch) as writer:
            yield writer, stops.append
        if stops and stops[0] > start:
            final = self.folder / f"{start:08d}-{stops[0]:08d}.parquet"
            if self._lasting:
                sync(scratch)
            scratch.rename(final)
            if self._lasting:
                sync(self.folder)
            self._files.append((start, stops[0], final))

    def join(self, path: Path, layers: int) -> tuple[Counter[str], int]:
        """All rows as one Parquet file; gives the rows of each domain and the active experts."""
        tokens: Counter[str] = Counter()
        active = _active(self._files[0][2], layers)
        expected = schema(layers, active)
        with pyarrow.parquet.ParquetWriter(path, expected, compression="zstd") as writer:
            for _start, _stop, file in self._files:
                table = pyarrow.parquet.read_table(file)
                if not table.schema.equals(expected):
                    raise InputError(
                        "expected every batch to have as many routes as the first, but another "
                        f"number came; does {file.parent} hold parts of another model?"
                    )
                writer.write_table(table, row_group_size=ROWS_A_GROUP)
                tokens.update(table.column("domain").to_pylist())
        return tokens, active

    def remove(self) -> None:
        """The parts are no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _key_of(folder: Path) -> Any:
    try:
        return read_json(folder / KEY)
    except InputError:
        return None


def _contiguous(folder: Path) -> list[tuple[int, int, Path]]:
    """Finished parts from batch 0 on, up to the first gap."""
    found: list[tuple[int, int, Path]] = []
    for path in sorted(folder.glob("*-*.parquet")):
        start, stop = (int(number) for number in path.stem.split("-"))
        if start != (found[-1][1] if found else 0):
            break
        found.append((start, stop, path))
    return found


def _active(file: Path, layers: int) -> int:
    kind = pyarrow.parquet.read_schema(file).field("experts").type
    return kind.list_size // layers
