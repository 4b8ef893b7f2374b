"""Text in: documents (moiety.documents), cut or packed into windows of token ids.

W windows, C context length (tokens in a window).
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moiety.documents import digest_documents, read_documents, write_documents
from moiety.errors import InputError

__all__ = [
    "Windows",
    "digest_documents",
    "packed_windows",
    "read_documents",
    "token_windows",
    "write_documents",
]

SLICE_CHARACTERS = 8
_Token = tuple[int, int]
"""A token's id and the UTF-8 bytes of text that it completes."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Documents cut to one context length.

    `ids_WC` int64 token ids, padded on the right; `mask_WC` 1 for tokens, 0 for padding;
    `document_W` the document each window was cut from (windows never span two documents);
    `bytes_W` the UTF-8 bytes that the window's *predicted* tokens stand for.
    """

    ids_WC: Tensor
    mask_WC: Tensor
    document_W: Tensor
    bytes_W: Tensor

    def __len__(self) -> int:
        return self.ids_WC.shape[0]

    def select(self, chosen: Tensor | slice) -> "Windows":
        """The windows that an index, a boolean mask or a slice chooses."""
        return Windows(
            ids_WC=self.ids_WC[chosen],
            mask_WC=self.mask_WC[chosen],
            document_W=self.document_W[chosen],
            bytes_W=self.bytes_W[chosen],
        )

    def batches(self, size: int) -> Iterator["Windows"]:
        """Slices of `size` windows, the last one possibly shorter."""
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))

    def hold_back(self, every: int = 4) -> tuple["Windows", "Windows"]:
        """Split by document: all but every `every`-th document, and those.

        With fewer documents than `every` the windows themselves are split that way.
        """
        documents, number_W = self.document_W.unique(return_inverse=True)
        if len(documents) < every:
            number_W = torch.arange(len(self))
        late_W = number_W % every == every - 1
        return self.select(~late_W), self.select(late_W)


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    context_length: int,
    limit: int | None = None,
    minimum: int = 8,
) -> Windows:
    """Cut documents into windows of at most `context_length` tokens.

    Each window starts with the tokenizer's beginning-of-sequence token, where it has one, so
    that every token of the document is predicted. Windows with fewer than `minimum` tokens are
    left out; at most `limit` windows are made, taken round-robin over the documents so that a
    long one cannot fill them all. Raises InputError when nothing is left.
    """
    _check_context(context_length)
    queues = [
        _cut(tokenizer, text, index, context_length, minimum)
        for index, text in enumerate(documents)
    ]
    pieces = _round_robin(queues, limit)
    if not pieces:
        raise InputError(
            f"expected documents of at least {minimum} tokens, but none of {len(queues)} is; "
            "give more text"
        )
    return _stack(pieces, _padding_id(tokenizer))


def packed_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    context_length: int,
    limit: int | None = None,
    minimum: int = 8,
    seed: int = 0,
) -> Windows:
    """Pack documents into windows of exactly `context_length` tokens, for calibration.

    Documents take turns in an order shuffled by `seed`, each with at most one window's tokens a
    turn, so that a long one cannot fill all of at most `limit` windows; text beyond those is not
    even tokenised. Every turn starts with the tokenizer's beginning-of-sequence token and every
    document ends with its end-of-sequence token, where it has them; a window that starts amid a
    document starts with the former too. Attention therefore sees more than one document, as in
    pretraining. Only the last window may be shorter (padded, mask 0); it is left out with fewer
    than `minimum` tokens. `document_W` is the document that a window starts with. Raises
    InputError when there are fewer than `minimum` tokens in all.
    """
    _check_context(context_length)
    texts = list(documents)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    turns = _turns(_segments(tokenizer, texts[index], index, context_length) for index in order)
    pieces: list[_Piece] = []
    for piece in _packed(turns, _special(tokenizer)[0], context_length):
        if len(piece.ids) >= min(minimum, context_length):
            pieces.append(piece)
        if len(pieces) == limit:
            break
    if not pieces:
        raise InputError(
            f"expected at least {minimum} tokens of text, but {len(texts)} documents have fewer; "
            "give more text"
        )
    return _stack(pieces, _padding_id(tokenizer))


def _check_context(context_length: int) -> None:
    if context_length < 2:
        raise InputError(f"context_length must be at least 2, but it is {context_length}")


@dataclass(frozen=True)
class _Piece:
    document: int
    ids: list[int]
    bytes: int


@dataclass(frozen=True)
class _Segment:
    """Consecutive tokens of one document."""

    document: int
    tokens: list[_Token]


def _encode(tokenizer: Any, text: str) -> list[_Token]:
    """The text's tokens, without special ones."""
    if not tokenizer.is_fast:
        raise InputError(
            "expected a tokenizer that says where its tokens stand (a fast one, with a "
            f"tokenizer.json), but {type(tokenizer).__name__} does not"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = itertools.accumulate((end for _, end in encoded["offset_mapping"]), max, initial=0)
    sizes = (len(text[start:end].encode()) for start, end in itertools.pairwise(ends))
    return list(zip(encoded["input_ids"], sizes, strict=True))


def _cut(
    tokenizer: Any, text: str, document: int, context_length: int, minimum: int
) -> list[_Piece]:
    start, _ = _special(tokenizer)
    step = context_length - len(start)
    tokens = _encode(tokenizer, text)
    cuts = (start + tokens[place : place + step] for place in range(0, len(tokens), step))
    return [_piece(document, cut) for cut in cuts if len(cut) >= minimum]


def _special(tokenizer: Any) -> tuple[list[_Token], list[_Token]]:
    """What documents start and end with: the tokenizer's special tokens, where it has them."""
    start_id, end_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = [] if start_id is None else [(start_id, 0)]
    return start, [] if end_id is None or end_id == start_id else [(end_id, 0)]


def _piece(document: int, tokens: list[_Token]) -> _Piece:
    return _Piece(document, [id for id, _ in tokens], sum(size for _, size in tokens[1:]))


def _segments(tokenizer: Any, text: str, document: int, context_length: int) -> Iterator[_Segment]:
    """A document's turns, each of one window's tokens; the text is tokenised as they are asked."""
    start, end = _special(tokenizer)
    step = context_length - len(start)
    tokens: list[_Token] = []
    for part in _slices(text, SLICE_CHARACTERS * context_length):
        tokens += _encode(tokenizer, part)
        while len(tokens) > step:
            yield _Segment(document, start + tokens[:step])
            tokens = tokens[step:]
    if tokens:
        yield _Segment(document, start + tokens + end)


def _slices(text: str, characters: int) -> Iterator[str]:
    """The text in slices of at most `characters`, cut before a space or line end if possible."""
    start = 0
    while len(text) - start > characters:
        window = start + characters // 2, start + characters
        stop = max(text.rfind(" ", *window), text.rfind("\n", *window))
        stop = stop if stop > start else start + characters
        yield text[start:stop]
        start = stop
    yield text[start:]


def _turns(sources: Iterable[Iterator[_Segment]]) -> Iterator[_Segment]:
    """One segment of every source, then the next of every source that has more, and so on."""
    while sources:
        remaining = []
        for source in sources:
            segment = next(source, None)
            if segment is not None:
                remaining.append(source)
                yield segment
        sources = remaining


def _packed(
    segments: Iterable[_Segment], start: list[_Token], context_length: int
) -> Iterator[_Piece]:
    document, window = 0, []
    for segment in segments:
        used = 0
        while used < len(segment.tokens):
            if not window:
                document = segment.document
                window = [] if segment.tokens[used : used + 1] == start else list(start)
            room = context_length - len(window)
            window += segment.tokens[used : used + room]
            used += room
            if len(window) == context_length:
                yield _piece(document, window)
                window = []
    if window:
        yield _piece(document, window)


def _round_robin(queues: list[list[_Piece]], limit: int | None) -> list[_Piece]:
    pieces: list[_Piece] = []
    depth = 0
    while any(depth < len(queue) for queue in queues):
        pieces.extend(queue[depth] for queue in queues if depth < len(queue))
        depth += 1
        if limit is not None and len(pieces) >= limit:
            return pieces[:limit]
    return pieces


def _padding_id(tokenizer: Any) -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0


def _stack(pieces: list[_Piece], padding_id: int) -> Windows:
    longest = max(len(piece.ids) for piece in pieces)
    ids_WC = torch.full((len(pieces), longest), padding_id, dtype=torch.int64)
    mask_WC = torch.zeros((len(pieces), longest), dtype=torch.int64)
    for row, piece in enumerate(pieces):
        ids_WC[row, : len(piece.ids)] = torch.tensor(piece.ids)
        mask_WC[row, : len(piece.ids)] = 1
    return Windows(
        ids_WC=ids_WC,
        mask_WC=mask_WC,
        document_W=torch.tensor([piece.document for piece in pieces]),
        bytes_W=torch.tensor([piece.bytes for piece in pieces]),
    )
