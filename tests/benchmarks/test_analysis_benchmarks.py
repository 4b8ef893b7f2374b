"""The benchmarks of traces and statistics run to their end and write their rows."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import statistics, trace

SMALL = ["--quick", "--layers", "2"]


@pytest.mark.parametrize(
    ("script", "arguments", "key"),
    [(trace, ["--quick"], "overhead"), (statistics, SMALL, "peak_gib")],
    ids=["trace", "statistics"],
)
def test_rows_are_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: ModuleType,
    arguments: list[str],
    key: str,
) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--json", str(file)])
    script.main()
    (row,) = json.loads(file.read_text())["rows"]
    assert key in row and row["target"]
