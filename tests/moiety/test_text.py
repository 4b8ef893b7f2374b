"""Documents in, windows out."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings

from moiety.errors import InputError
from moiety.text import read_documents, token_windows, write_documents


def test_jsonl_parquet_folders_and_plain_files(tmp_path: Path) -> None:
    texts = ["one\nline", "two \u2028 separators", "три"]
    write_documents(tmp_path / "a.jsonl", texts)
    table = pyarrow.table({"text": texts, "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "plain").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "plain" / f"{number}.md").write_text(text)
    for path in ("a.jsonl", "b.parquet", "plain"):
        assert read_documents(tmp_path / path) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\x89PNG\xff", "binary"),
        ("a.txt", b"text\0text", "NUL"),
        ("a.txt", b" \n", "empty"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', r'"text".* line 2'),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"line 2"),
        ("a.parquet", b"PAR1", "Parquet"),
    ],
)
def test_refusals_name_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_documents(tmp_path / name)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=20, max_size=200), min_size=1, max_size=5), st.integers(9, 40))
def test_windows_cover_every_byte_once(world: Any, texts: list[str], context: int) -> None:
    windows = token_windows(world.tokenizer, texts, context, minimum=2)
    assert windows.ids_WC.shape[1] <= context
    assert (windows.ids_WC[:, 0] == world.tokenizer.bos_token_id).all()
    rows = zip(windows.document_W.tolist(), windows.ids_WC, windows.mask_WC, strict=True)
    pieces: dict[int, list[int]] = {}
    for document, ids, mask in rows:
        pieces.setdefault(document, []).extend(ids[mask.bool()][1:].tolist())
    for document, ids in pieces.items():
        assert world.tokenizer.decode(ids) == texts[document]


def test_bytes_count_what_is_predicted(world: Any) -> None:
    text = "alpha beta gamma delta " * 30
    windows = token_windows(world.tokenizer, [text], 16, minimum=2)
    assert int(windows.bytes_W.sum()) == len(text.encode())


def test_limit_takes_from_every_document(world: Any) -> None:
    texts = ["alpha beta gamma " * 100, "one two three four " * 10, "red green blue " * 10]
    windows = token_windows(world.tokenizer, texts, 16, limit=6)
    assert windows.document_W.unique().tolist() == [0, 1, 2]
    assert len(windows) == 6


def test_held_back_documents_are_others(world: Any) -> None:
    texts = ["alpha beta gamma " * 20] * 9
    kept, late = token_windows(world.tokenizer, texts, 16).hold_back()
    assert not set(kept.document_W.tolist()) & set(late.document_W.tolist())
    assert late.document_W.unique().tolist() == [3, 7]
    alone = token_windows(world.tokenizer, texts[:1], 16)
    kept, late = alone.hold_back()
    assert len(kept) + len(late) == len(alone) and len(late) > 0


def test_too_little_text(world: Any) -> None:
    with pytest.raises(InputError, match="at least 8 tokens"):
        token_windows(world.tokenizer, ["a"], 16)
