"""A trace on disk: `routes.parquet`, one row a token, and `trace.json`, which says what it holds.

T tokens, L routed layers, A active experts, E experts.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from moiety.errors import InputError
from moiety.files import read_json

FORMAT = "moiety.trace"
VERSION = 1
ROUTES = "routes.parquet"
HEADER = "trace.json"
PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a trace holds: the content of `trace.json`.

    `layers` are the names of the gates in layer order, `active` the experts that each token goes
    to, `tokens` the rows of each domain, `context_length` the longest window in tokens.
    """

    model: str
    experts: tuple[str, ...]
    layers: tuple[str, ...]
    active: int
    tokens: dict[str, int]
    documents: dict[str, int]
    context_length: int
    vocabulary: int
    format: str = FORMAT
    version: int = VERSION

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains in the order they were traced."""
        return tuple(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, format and version first."""
        values = asdict(self)
        return {"format": values.pop("format"), "version": values.pop("version"), **values}


def schema(layers: int, active: int) -> pyarrow.Schema:
    """The columns of `routes.parquet` for L layers and A active experts."""
    names = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    routes = layers * active
    return pyarrow.schema(
        [
            ("document", pyarrow.int32()),
            ("domain", names),
            ("window", pyarrow.int32()),
            ("position", pyarrow.int32()),
            ("token_id", pyarrow.int32()),
            ("text", pyarrow.string()),
            ("phase", names),
            ("loss", pyarrow.float32()),
            ("experts", pyarrow.list_(pyarrow.int16(), routes)),
            ("weights", pyarrow.list_(pyarrow.float32(), routes)),
            ("entropy", pyarrow.list_(pyarrow.float32(), layers)),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Recorded routes of labelled documents.

    `domain_T` indexes `header.domains`, `phase_T` PHASES; `document_T` is unique across domains; `window_T` counts
    the windows of a document and `position_T` the tokens of a window, both from 0; `loss_T` is
    in nats and NaN for the first token of a window; `experts_TLA` and `weights_TLA` are best
    weight first; `entropy_TL` is that of the gate's softmax over all experts, in nats.
    """

    header: Header
    document_T: NDArray[numpy.int32]
    domain_T: NDArray[numpy.int32]
    phase_T: NDArray[numpy.int32]
    window_T: NDArray[numpy.int32]
    position_T: NDArray[numpy.int32]
    token_id_T: NDArray[numpy.int32]
    loss_T: NDArray[numpy.float32]
    experts_TLA: NDArray[numpy.int16]
    weights_TLA: NDArray[numpy.float32]
    entropy_TL: NDArray[numpy.float32]
    text_T: pyarrow.ChunkedArray = field(repr=False)

    def __len__(self) -> int:
        return len(self.document_T)

    @classmethod
    def open(cls, path: str | Path) -> "Trace":
        """Read the trace in a folder.

        Raises InputError when it is absent, of another version, truncated, or its rows are not
        what its header says.
        """
        path = Path(path)
        header = _read_header(path / HEADER)
        table = _read_routes(path / ROUTES, schema(len(header.layers), header.active))
        trace = cls(header=header, **_columns(table, header))
        _check(trace, path)
        return trace

    def rows(self, rows: NDArray[numpy.intp]) -> "Trace":
        """The trace of some rows, in that order; domains without any stay named."""
        counts = numpy.bincount(self.domain_T[rows], minlength=len(self.header.domains))
        columns = {
            column.name: getattr(self, column.name)[rows]
            for column in fields(self)
            if column.name not in ("header", "text_T")
        }
        tokens = dict(zip(self.header.domains, counts.tolist(), strict=True))
        text_T = self.text_T.take(pyarrow.array(rows))
        return Trace(header=replace(self.header, tokens=tokens), text_T=text_T, **columns)

    def phase(self, name: str) -> "Trace":
        """The rows of one phase, `prefill` or `decode`; InputError when there are none."""
        if name not in PHASES or not (self.phase_T == PHASES.index(name)).any():
            raise InputError(
                f"expected rows of a phase of {PHASES}, but there are none of {name!r}"
            )
        return self.rows(numpy.flatnonzero(self.phase_T == PHASES.index(name)))

    def texts(self, rows: NDArray[numpy.intp]) -> list[str]:
        """The text pieces of some rows."""
        return [str(piece) for piece in self.text_T.take(pyarrow.array(rows)).to_pylist()]


def _read_header(path: Path) -> Header:
    if not path.parent.is_dir():
        raise InputError(f"expected a trace folder at {path.parent}, but there is none")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f'expected {path} to say "format": "{FORMAT}", but it does not')
    if values.get("version") != VERSION:
        raise InputError(
            f"expected version {VERSION} in {path}, but it is {values.get('version')!r}; "
            "trace the model again with this version of moiety"
        )
    try:
        header = Header(
            **{**values, "experts": tuple(values["experts"]), "layers": tuple(values["layers"])}
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"expected the fields of a trace in {path}, but: {error}") from error
    _check_header(header, path)
    return header


def _check_header(header: Header, path: Path) -> None:
    rules = {
        "model must be a name": isinstance(header.model, str),
        "experts must be one or more names, each once": header.experts
        and all(isinstance(name, str) for name in header.experts)
        and len(set(header.experts)) == len(header.experts),
        "layers must be one or more names": header.layers
        and all(isinstance(name, str) for name in header.layers),
        "active must be a whole number from 1 to the number of experts": isinstance(
            header.active, int
        )
        and 1 <= header.active <= len(header.experts),
        "tokens must count the rows of each domain": isinstance(header.tokens, dict)
        and header.tokens
        and all(isinstance(count, int) and count > 0 for count in header.tokens.values()),
        "documents must count the documents of each domain": isinstance(header.documents, dict)
        and set(header.documents) == set(header.tokens)
        and all(isinstance(count, int) and count > 0 for count in header.documents.values()),
        "context_length and vocabulary must be whole numbers": isinstance(
            header.context_length, int
        )
        and isinstance(header.vocabulary, int),
    }
    for rule, holds in rules.items():
        if not holds:
            raise InputError(f"{path}: {rule}")


def _read_routes(path: Path, expected: pyarrow.Schema) -> pyarrow.Table:
    try:
        table = pyarrow.parquet.read_table(path)
    except FileNotFoundError as error:
        raise InputError(f"expected routes at {path}, but there are none") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"expected a whole Parquet file at {path}, but: {error}; was it cut short?"
        ) from error
    if not table.schema.equals(expected):
        raise InputError(
            f"expected the columns\n{expected}\nin {path}, but they are\n"
            f"{table.schema.remove_metadata()}"
        )
    for name in expected.names:
        if name != "loss" and table.column(name).null_count:
            raise InputError(f"expected a value in every row of column {name} of {path}")
    return table


def _columns(table: pyarrow.Table, header: Header) -> dict[str, Any]:
    layers, active = len(header.layers), header.active
    return {
        "document_T": table.column("document").to_numpy(),
        "domain_T": _codes(table.column("domain"), header.domains),
        "phase_T": _codes(table.column("phase"), PHASES),
        "window_T": table.column("window").to_numpy(),
        "position_T": table.column("position").to_numpy(),
        "token_id_T": table.column("token_id").to_numpy(),
        "loss_T": table.column("loss").fill_null(float("nan")).to_numpy(),
        "experts_TLA": _flat(table, "experts").reshape(-1, layers, active),
        "weights_TLA": _flat(table, "weights").reshape(-1, layers, active),
        "entropy_TL": _flat(table, "entropy").reshape(-1, layers),
        "text_T": table.column("text"),
    }


def _codes(column: pyarrow.ChunkedArray, words: tuple[str, ...]) -> NDArray[numpy.int32]:
    names = column.unify_dictionaries().combine_chunks()
    known = {name: code for code, name in enumerate(words)}
    codes = [known.get(name, -1) for name in names.dictionary.to_pylist()]
    return numpy.array(codes, dtype=numpy.int32)[names.indices.to_numpy()]


def _flat(table: pyarrow.Table, name: str) -> NDArray[Any]:
    return table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _check(trace: Trace, path: Path) -> None:
    header = trace.header
    found = numpy.bincount(trace.domain_T[trace.domain_T >= 0], minlength=len(header.domains))
    counts = dict(zip(header.domains, found.tolist(), strict=True))
    if counts != header.tokens or sum(counts.values()) != len(trace):
        raise InputError(
            f"expected the tokens {header.tokens} in {path}, but there are {counts} "
            f"in {len(trace)} rows; is {ROUTES} from another trace?"
        )
    if trace.phase_T.min() < 0:
        raise InputError(f"expected the phases {', '.join(PHASES)} in {path}, but there are others")
    low, high = int(trace.experts_TLA.min()), int(trace.experts_TLA.max())
    if low < 0 or high >= len(header.experts):
        raise InputError(
            f"expected experts 0..{len(header.experts) - 1} in {path}, but they are {low}..{high}"
        )
    if not (numpy.isfinite(trace.weights_TLA).all() and trace.weights_TLA.min() >= 0):
        raise InputError(f"expected weights in {path} to be finite and not negative")
