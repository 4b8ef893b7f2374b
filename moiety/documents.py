"""Documents in: from files, folders and datasets of the hub; documents out as JSONL."""

import hashlib
import itertools
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from moiety.errors import InputError

DATASETS = "datasets:"
DATASET_CHARACTERS = 32_000_000
LONGEST_REASON = 300
FORM = "datasets:OWNER/NAME[:CONFIG][#SPLIT][@COLUMN]"
_SOURCE = re.compile(
    r"(?P<id>[^:#@]+)(:(?P<config>[^:#@]+))?(#(?P<split>[^:#@]+))?(@(?P<column>.+))?"
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_SUFFIXES = {".txt", ".md", ".json", ".jsonl", ".parquet", ".csv"}


def read_documents(source: str | Path, limit: int | None = None) -> list[str]:
    """Read the documents of a corpus, at most `limit` of them.

    A `.jsonl` file holds one document a line (`{"text": ...}`), a `.parquet` file one a row
    (column `text`), any other file is one document, a folder holds one document a file.
    `datasets:OWNER/NAME[:CONFIG][#SPLIT][@COLUMN]` (split `train` and column `text` unless it
    says others; a local folder may stand for the id) is streamed through the datasets library
    and read up to DATASET_CHARACTERS characters. Raises InputError for an absent, empty or
    binary source, or one without such text.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 document, but it is {limit}")
    if str(source).startswith(DATASETS):
        found = _read_dataset(str(source))
    else:
        found = _read_path(Path(source).expanduser())
    documents = list(itertools.islice((text for text in found if text.strip()), limit))
    if not documents:
        raise InputError(f"expected text in {source}, but it is empty; give a file with text in it")
    return documents


def write_documents(path: Path, documents: Iterable[str]) -> None:
    """Write documents as JSONL, one `{"text": ...}` a line."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def digest_documents(documents: Iterable[str]) -> str:
    """Name documents by their content and order: 16 hexadecimal digits of SHA-256."""
    state = hashlib.sha256()
    for text in documents:
        encoded = text.encode()
        state.update(len(encoded).to_bytes(8, "little"))
        state.update(encoded)
    return state.hexdigest()[:16]


def _read_path(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return (text for file in files for text in _read_file(file))
    if path.is_file():
        return iter(_read_file(path))
    hint = ""
    if _HUB_ID.fullmatch(str(path)) and path.suffix.lower() not in _FILE_SUFFIXES:
        hint = f"; for a dataset of the hub write {DATASETS}{path}"
    raise InputError(f"expected a text file or folder at {path}, but there is none{hint}")


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
    if re.search("[\ud800-\udfff]", text):
        raise InputError(f"expected Unicode text in {place}, but it holds half a surrogate pair")
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


def _read_dataset(source: str) -> Iterator[str]:
    """Texts of a dataset in its own order, as many as fit in DATASET_CHARACTERS."""
    from datasets.exceptions import DatasetsError

    characters = 0
    try:
        for text in _column(source):
            characters += len(text)
            yield text
            if characters >= DATASET_CHARACTERS:
                return
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = textwrap.shorten(str(error), LONGEST_REASON)
        raise InputError(f"expected a dataset at {source}, but: {reason}") from error


def _column(source: str) -> Iterator[str]:
    import datasets

    match = _SOURCE.fullmatch(source.removeprefix(DATASETS))
    if match is None:
        raise InputError(f"expected {FORM}, but it is {source!r}")
    folder, column = Path(match["id"]).expanduser(), match["column"] or "text"
    if not folder.is_dir() and not _HUB_ID.fullmatch(match["id"]):
        raise InputError(f"expected {FORM} or a folder for OWNER/NAME, but it is {source!r}")
    name = str(folder.resolve()) if folder.is_dir() else match["id"]
    split = match["split"] or "train"
    rows = datasets.load_dataset(name, match["config"], split=split, streaming=True)
    kinds = {name: getattr(kind, "dtype", "list") for name, kind in (rows.features or {}).items()}
    if kinds.get(column) not in ("string", "large_string"):
        raise InputError(_other_column(source, column, kinds))
    return (row[column] for row in rows.select_columns(column) if row[column] is not None)


def _other_column(source: str, column: str, kinds: dict[str, str]) -> str:
    texts = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    came = f"it holds {kinds[column]} values" if column in kinds else "there is none"
    advice = f"name one of {', '.join(texts)} with @COLUMN" if texts else "export it as plain text"
    return (
        f"expected a column {column} of strings in {source}, but {came} "
        f"(columns: {', '.join(kinds) or 'unknown'}); {advice}"
    )
