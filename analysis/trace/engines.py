"""Routes that other engines recorded, as traces: vLLM and SGLang responses, Megatron's JSONL.

T tokens, L routed layers, A active experts, E experts.
"""

import base64
import binascii
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from moiety.analysis.trace.file import HEADER, ROUTES, Header
from moiety.analysis.trace.pieces import Pieces
from moiety.analysis.trace.writer import RouteWriter
from moiety.errors import InputError
from moiety.files import new_folder, write_json


@dataclass(frozen=True)
class Shape:
    """Sizes of the model that was served: routed layers, routes a token, experts' names."""

    layers: int
    active: int
    experts: tuple[str, ...]


@dataclass(frozen=True)
class _Document:
    """One recorded request: the first `prompt` tokens were prefilled, the others decoded."""

    ids_T: NDArray[numpy.int32]
    prompt: int
    experts_TLA: NDArray[numpy.int16]
    weights_TLA: NDArray[numpy.float32]


def import_routes(
    data: Mapping[str, str | Path],
    out: str | Path,
    shape: Shape,
    *,
    model: str = "imported",
    tokenizer: Any = None,
) -> Path:
    """Write routes that an engine recorded, one JSONL file a domain, as the trace `out`.

    A line of vLLM or SGLang (`--enable-return-routed-experts`) is one request: `routed_experts`,
    nested lists (T, L, A) or base64 of little-endian int32 (SGLang puts it in `meta_info`), and
    `token_ids` of prompt and answer, `prompt_tokens` of which are the prompt's (all by default).
    The last token of an answer has no routes. A line of Megatron is one layer of one batch:
    `layer`, `batch_id`, `topk_experts` (T, A), `topk_weights` perhaps; a batch is one document,
    without token ids unless a line has `token_ids`.

    What engines do not record is unknown here: losses and entropies are NaN; without weights a
    token's routes weigh the same and its first expert is the one listed first; without token ids
    (0 then) the vocabulary's statistics mean nothing. Raises InputError for a line of another form.
    """
    files = {domain: Path(path) for domain, path in data.items()}
    pieces = None if tokenizer is None else Pieces(tokenizer)
    counts: Counter[str] = Counter()
    longest = number = 0
    with new_folder(Path(out)) as scratch:
        with RouteWriter(scratch / ROUTES) as writer:
            for domain, path in files.items():
                for document in _read(path, shape):
                    writer.add(domain, _columns(document, number, pieces))
                    number, longest = number + 1, max(longest, len(document.ids_T))
                    counts[domain] += 1
                if not counts[domain]:
                    raise InputError(f"expected recorded routes in {path}, but there are none")
        header = Header(
            model=model,
            experts=shape.experts,
            layers=tuple(f"layer {layer}" for layer in range(shape.layers)),
            active=shape.active,
            tokens=dict(writer.tokens),
            documents=dict(counts),
            context_length=longest,
            vocabulary=0 if tokenizer is None else len(tokenizer),
        )
        write_json(scratch / HEADER, header.to_dict())
    return Path(out)


def _read(path: Path, shape: Shape) -> Iterator[_Document]:
    rows = list(_rows(path))
    if any("topk_experts" in row for _place, row in rows):
        yield from _megatron(rows, shape)
        return
    for place, row in rows:
        yield _request(row, shape, place)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected recorded routes in {path}, but: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"expected a JSON object in {place}, but: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"expected a JSON object in {place}, but it is another value")
            yield place, row


def _request(row: dict[str, Any], shape: Shape, place: str) -> _Document:
    told = row["meta_info"] if isinstance(row.get("meta_info"), dict) else {}
    routes = row.get("routed_experts", told.get("routed_experts"))
    if routes is None:
        raise InputError(f"expected routed_experts in {place}, but there are none")
    experts_TLA = _experts(routes, shape, place)
    ids_T = _ids(row.get("token_ids"), len(experts_TLA), place)
    prompt = row.get("prompt_tokens", told.get("prompt_tokens", len(ids_T)))
    if not isinstance(prompt, int) or prompt < 1:
        raise InputError(
            f"expected prompt_tokens to be at least 1 in {place}, but it is {prompt!r}"
        )
    weights = row.get("routed_weights")
    return _Document(ids_T, prompt, experts_TLA, _weights(weights, experts_TLA.shape, place))


def _experts(routes: Any, shape: Shape, place: str) -> NDArray[numpy.int16]:
    try:
        if isinstance(routes, str):
            flat = numpy.frombuffer(base64.b64decode(routes, validate=True), "<i4")
        else:
            flat = numpy.asarray(routes, dtype=numpy.int64).ravel()
        experts_TLA = flat.reshape(-1, shape.layers, shape.active)
    except (ValueError, TypeError, binascii.Error) as error:
        raise InputError(
            f"expected routes (tokens, {shape.layers}, {shape.active}) in {place}, but: {error}"
        ) from error
    if not experts_TLA.size or experts_TLA.min() < 0 or experts_TLA.max() >= len(shape.experts):
        raise InputError(
            f"expected experts 0..{len(shape.experts) - 1} in {place}, but there are others or none"
        )
    return experts_TLA.astype(numpy.int16)


def _ids(ids: Any, tokens: int, place: str) -> NDArray[numpy.int32]:
    """Token ids of the tokens that have routes; those of an answer's last token are left out."""
    if ids is None:
        return numpy.zeros(tokens, numpy.int32)
    if not isinstance(ids, list) or not tokens <= len(ids) <= tokens + 1:
        raise InputError(f"expected {tokens} token_ids, or one more, in {place}, but it is not so")
    return numpy.asarray(ids[:tokens], dtype=numpy.int32)


def _weights(weights: Any, shape: Sequence[int], place: str) -> NDArray[numpy.float32]:
    if weights is None:
        return numpy.full(shape, 1 / shape[-1], numpy.float32)
    try:
        return numpy.asarray(weights, dtype=numpy.float32).reshape(shape)
    except (ValueError, TypeError) as error:
        raise InputError(f"expected as many weights as routes in {place}, but: {error}") from error


def _megatron(rows: list[tuple[str, dict[str, Any]]], shape: Shape) -> Iterator[_Document]:
    batches: dict[Any, dict[int, tuple[str, dict[str, Any]]]] = {}
    for place, row in rows:
        if "layer" not in row or "batch_id" not in row or "topk_experts" not in row:
            raise InputError(f"expected layer, batch_id and topk_experts in {place}")
        batches.setdefault(row["batch_id"], {})[row["layer"]] = place, row
    for number, layers in batches.items():
        place = next(iter(layers.values()))[0]
        if len(layers) != shape.layers:
            raise InputError(
                f"expected {shape.layers} layers of batch {number}, from {place} on, but there are "
                f"{len(layers)}"
            )
        ordered = [layers[layer][1] for layer in sorted(layers)]
        one = Shape(1, shape.active, shape.experts)
        experts = [_experts(row["topk_experts"], one, place) for row in ordered]
        if len({len(part) for part in experts}) > 1:
            raise InputError(f"expected equally many tokens in every layer of batch {number}")
        experts_TLA = numpy.concatenate(experts, 1)
        parts = [
            _weights(row.get("topk_weights"), part.shape, place)
            for row, part in zip(ordered, experts, strict=True)
        ]
        ids_T = _ids(ordered[0].get("token_ids"), len(experts_TLA), place)
        yield _Document(ids_T, len(ids_T), experts_TLA, numpy.concatenate(parts, 1))


def _columns(document: _Document, number: int, pieces: Pieces | None) -> dict[str, Any]:
    tokens, layers, active = document.experts_TLA.shape
    order_TLA = numpy.argsort(-document.weights_TLA, axis=-1, kind="stable")
    unknown = numpy.full(tokens, numpy.nan, numpy.float32)
    place_T = numpy.arange(tokens, dtype=numpy.int32)
    sorted_ = [
        numpy.take_along_axis(values, order_TLA, -1).reshape(tokens, layers * active)
        for values in (document.experts_TLA, document.weights_TLA)
    ]
    return {
        "document": numpy.full(tokens, number, numpy.int32),
        "window": numpy.zeros(tokens, numpy.int32),
        "position": place_T,
        "token_id": document.ids_T,
        "text": [""] * tokens if pieces is None else pieces(document.ids_T.tolist()),
        "phase": (place_T >= document.prompt).astype(numpy.int32),
        "loss": unknown,
        "experts": sorted_[0],
        "weights": sorted_[1],
        "entropy": numpy.full((tokens, layers), numpy.nan, numpy.float32),
    }
