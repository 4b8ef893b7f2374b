"""What the token view of a report shows: some documents of each domain, packed for a page.

T tokens, L routed layers, A active experts.
"""

import base64
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
from numpy.typing import NDArray

from moiety.analysis.charts import expert_colours
from moiety.analysis.statistics import RoutingSummary
from moiety.analysis.statistics.measures import token_shares
from moiety.analysis.trace.file import PHASES, Trace
from moiety.analysis.visible import visible, visible_line

STEPS = 255
DECODE = PHASES.index("decode")


def token_view(trace: Trace, summary: RoutingSummary, max_tokens: int) -> dict[str, Any]:
    """The data of the token view: at most `max_tokens` tokens, shared equally by the domains.

    Weights and entropies are quantised to 1/255 of their range (entropy: log of the number of
    experts); arrays are base64 of bytes, experts in one or two bytes, little-endian.
    """
    header = trace.header
    documents = [
        _document(trace, code, rows)
        for code in range(len(header.domains))
        for rows in _rows(trace, code, max_tokens // len(header.domains))
    ]
    return {
        "domains": [visible_line(name) for name in header.domains],
        "experts": [visible_line(name) for name in header.experts],
        "colours": expert_colours(summary),
        "layers": len(header.layers),
        "active": header.active,
        "expertBytes": _expert_type(trace).itemsize,
        "total": [len(trace), sum(header.documents.values())],
        "documents": documents,
    }


def shown_documents(view: Mapping[str, Any]) -> int:
    """How many documents a token view holds, whole or cut."""
    return len(view["documents"])


def shown_tokens(view: Mapping[str, Any]) -> int:
    """How many tokens a token view holds."""
    return sum(len(document["tokens"]) for document in view["documents"])


def _rows(trace: Trace, code: int, budget: int) -> Iterator[NDArray[numpy.intp]]:
    """The rows of a domain's documents in reading order, until the budget is spent."""
    rows = numpy.flatnonzero(trace.domain_T == code)
    keys = (trace.position_T[rows], trace.window_T[rows], trace.document_T[rows])
    rows = rows[numpy.lexsort(keys)][:budget]
    starts = numpy.flatnonzero(numpy.diff(trace.document_T[rows])) + 1
    yield from (part for part in numpy.split(rows, starts) if len(part))


def _document(trace: Trace, code: int, rows: NDArray[numpy.intp]) -> dict[str, Any]:
    active = trace.header.active
    weights = token_shares(trace.weights_TLA[rows].reshape(-1, active))
    ceiling = max(numpy.log(len(trace.header.experts)), 1e-9)
    losses = trace.loss_T[rows].astype(float)
    return {
        "id": int(trace.document_T[rows[0]]),
        "domain": code,
        "tokens": [visible(piece) for piece in trace.texts(rows)],
        "ids": trace.token_id_T[rows].tolist(),
        "windows": (numpy.flatnonzero(numpy.diff(trace.window_T[rows])) + 1).tolist(),
        "decoded": numpy.flatnonzero(trace.phase_T[rows] == DECODE).tolist(),
        "loss": [round(loss, 3) if numpy.isfinite(loss) else None for loss in losses],
        "experts": _packed(trace.experts_TLA[rows].astype(_expert_type(trace))),
        "weights": _packed(_quantised(weights)),
        "entropy": _packed(_quantised(trace.entropy_TL[rows] / ceiling)),
    }


def _expert_type(trace: Trace) -> numpy.dtype[Any]:
    return numpy.dtype("u1" if len(trace.header.experts) <= STEPS + 1 else "<u2")


def _quantised(values: NDArray[Any]) -> NDArray[numpy.uint8]:
    return numpy.rint(numpy.clip(values, 0, 1) * STEPS).astype(numpy.uint8)


def _packed(values: NDArray[Any]) -> str:
    return base64.b64encode(numpy.ascontiguousarray(values).tobytes()).decode("ascii")
