"""Write the rows of a trace as they come, in bounded memory."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet

from moiety.analysis.trace.file import PHASES, schema

ROWS_A_GROUP = 65_536


class RouteWriter:
    """Streams rows to Parquet in groups; the first batch settles how many experts are active.

    `tokens` counts the rows of each domain so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: pyarrow.parquet.ParquetWriter | None = None
        self._held: list[pyarrow.Table] = []
        self.tokens: Counter[str] = Counter()
        self.active = 0

    def __enter__(self) -> "RouteWriter":
        return self

    def __exit__(self, failed: Any, _error: Any, _traceback: Any) -> None:
        if self._file is None:
            return
        if failed is None:
            self._flush()
        self._file.close()

    def add(self, domain: str, columns: dict[str, Any]) -> None:
        """Append the rows of one batch: `columns` of the schema but domain; no phase is prefill."""
        layers = columns["entropy"].shape[1]
        active = columns["experts"].shape[1] // layers
        if self._file is None:
            self.active = active
            self._file = pyarrow.parquet.ParquetWriter(
                self._path, schema(layers, active), compression="zstd"
            )
        self._held.append(_table(domain, columns, self._file.schema))
        self.tokens[domain] += len(columns["text"])
        if sum(table.num_rows for table in self._held) >= ROWS_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._held and self._file is not None:
            self._file.write_table(pyarrow.concat_tables(self._held).unify_dictionaries())
        self._held = []


def _phases(code_T: Any, rows: int) -> pyarrow.DictionaryArray:
    codes = numpy.zeros(rows, numpy.int32) if code_T is None else code_T
    return pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(codes, pyarrow.int32()), pyarrow.array(PHASES)
    )


def _table(domain: str, columns: dict[str, Any], expected: pyarrow.Schema) -> pyarrow.Table:
    rows = len(columns["text"])
    arrays: dict[str, Any] = {
        **columns,
        "domain": pyarrow.array([domain] * rows).dictionary_encode(),
        "phase": _phases(columns.get("phase"), rows),
        "loss": pyarrow.array(columns["loss"], mask=numpy.isnan(columns["loss"])),
    }
    for name in ("experts", "weights", "entropy"):
        values = numpy.ascontiguousarray(columns[name])
        arrays[name] = pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(values.reshape(-1)), values.shape[1]
        )
    return pyarrow.table({column.name: arrays[column.name] for column in expected}, expected)
