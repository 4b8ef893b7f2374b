"""The file of an experiment's results: how they were measured, the controls, the cells so far."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moiety.errors import InputError
from moiety.files import read_json


def started(
    out: Path, how: Mapping[str, Any], controls: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """The results so far, with controls measured if need be; the caller writes them down.

    Raises InputError when those in `out` were measured in another way than `how`.
    """
    results = read_json(out) if out.is_file() else {"cells": {}, **how}
    for name, value in how.items():
        if results.get(name) != value:
            raise InputError(
                f"expected results of {name} {value} in {out}, but it has {results.get(name)}; "
                "choose another --out"
            )
    if "controls" not in results:
        results["controls"] = controls()
    return results
