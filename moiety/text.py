"""Text in: documents from files, and documents into windows of token ids.

W windows, C context length (tokens in a window).
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moiety.errors import InputError


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


def read_documents(path: str | Path) -> list[str]:
    """Read the documents of a corpus.

    A `.jsonl` file holds one document a line (`{"text": ...}`), a `.parquet` file one a row
    (column `text`), any other file is one document, a folder holds one document a file.
    Raises InputError for an absent, empty or binary file, or a line without text.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        documents = [text for file in files for text in _read_file(file)]
    elif path.is_file():
        documents = _read_file(path)
    else:
        raise InputError(f"expected a text file or folder at {path}, but there is none")
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise InputError(f"expected text in {path}, but it is empty; give a file with text in it")
    return documents


def _read_file(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"expected UTF-8 text in {path}, but byte {error.start} is not text; "
            "is it a binary file?"
        ) from error
    if "\0" in text:
        raise InputError(f"expected text in {path}, but it holds NUL bytes; is it a binary file?")
    if path.suffix != ".jsonl":
        return [text]
    lines = enumerate(text.split("\n"), start=1)
    return [_document(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _document(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"expected a JSON object in {place}, but: {error}") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InputError(f'expected an object with a string "text" in {place}, but it has none')
    return text


def _read_parquet(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["text"])
    except (pyarrow.ArrowInvalid, KeyError) as error:
        raise InputError(
            f"expected a Parquet file with a column text at {path}, but: {error}"
        ) from error
    return [str(text) for text in table.column("text").to_pylist() if text is not None]


def write_documents(path: Path, documents: Iterable[str]) -> None:
    """Write documents as JSONL, one `{"text": ...}` a line."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


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
    if context_length < 2:
        raise InputError(f"context_length must be at least 2, but it is {context_length}")
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


@dataclass(frozen=True)
class _Piece:
    document: int
    ids: list[int]
    bytes: int


def _cut(
    tokenizer: Any, text: str, document: int, context_length: int, minimum: int
) -> list[_Piece]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    start_ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = context_length - len(start_ids)
    pieces = []
    for start in range(0, len(ids), step):
        stop = min(start + step, len(ids))
        if len(start_ids) + stop - start < minimum:
            continue
        first = start if start_ids else start + 1
        covered = text[offsets[first][0] : offsets[stop - 1][1]]
        piece_ids = start_ids + list(ids[start:stop])
        pieces.append(_Piece(document, piece_ids, len(covered.encode())))
    return pieces


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
