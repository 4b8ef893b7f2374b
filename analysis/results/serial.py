"""Results as JSON and back: arrays as nested lists, NaN as null."""

import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, PlainSerializer, TypeAdapter, ValidationError
from pydantic import PlainValidator as Validator

from moiety.errors import InputError
from moiety.files import read_json, write_json

Result = TypeVar("Result")
CONFIG = ConfigDict(extra="forbid")
"""`__pydantic_config__` of every result: a field that nobody knows is an error."""


def _floats(value: Any) -> NDArray[numpy.float64]:
    return numpy.asarray(value, dtype=numpy.float64)


def _integers(value: Any) -> NDArray[numpy.int64]:
    return numpy.asarray(value, dtype=numpy.int64)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _listed(values: NDArray[Any]) -> Any:
    return _plain(numpy.asarray(values).tolist())


def _known(value: Any) -> Any:
    return math.nan if value is None else value


Floats = Annotated[NDArray[numpy.float64], Validator(_floats), PlainSerializer(_listed)]
Integers = Annotated[NDArray[numpy.int64], Validator(_integers), PlainSerializer(_listed)]
Number = Annotated[float, BeforeValidator(_known), PlainSerializer(_plain)]


def to_dict(result: Any) -> dict[str, Any]:
    """A result as JSON values, with its kind under `result`."""
    values = TypeAdapter(type(result)).dump_python(result, mode="json")
    return {"result": type(result).__name__, **values}


def from_dict(kind: type[Result], values: Any) -> Result:
    """A result from what `to_dict` gave; InputError names the first field that does not fit."""
    if not isinstance(values, dict) or values.get("result") != kind.__name__:
        raise InputError(f"expected a result of kind {kind.__name__}, but it is another")
    fields = {name: value for name, value in values.items() if name != "result"}
    try:
        return TypeAdapter(kind).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{kind.__name__}: {place}: {first['msg'].lower()}") from error


def write_result(path: Path, result: Any) -> None:
    """Write a result to a JSON file in one step."""
    write_json(path, to_dict(result))


def read_result(kind: type[Result], path: str | Path) -> Result:
    """Read a result that `write_result` wrote; InputError when the file is not one."""
    try:
        return from_dict(kind, read_json(Path(path)))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
