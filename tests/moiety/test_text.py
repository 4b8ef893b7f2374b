"""Documents in, windows out."""

import copy
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings

from moiety import documents
from moiety.errors import InputError
from moiety.text import (
    digest_documents,
    packed_windows,
    read_documents,
    token_windows,
    write_documents,
)


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
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
        ("a.parquet", b"PAR1", "Parquet"),
    ],
)
def test_refusals_name_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_documents(tmp_path / name)


@pytest.fixture(scope="module")
def datasets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    for split, texts in (("train", ["one", None, "two", "  ", "three"]), ("test", ["four"])):
        column = pyarrow.array(texts, pyarrow.string())
        table = pyarrow.table({"text": column, "body": column, "rank": [1] * len(texts)})
        pyarrow.parquet.write_table(table, folder / f"{split}-0.parquet")
    return folder


def test_datasets_are_streamed_by_split_and_column(datasets_folder: Path) -> None:
    source = f"datasets:{datasets_folder}"
    assert read_documents(source) == ["one", "two", "three"]
    assert read_documents(source, limit=2) == ["one", "two"]
    assert read_documents(f"{source}:default#test@body") == ["four"]


def test_datasets_of_json_lines(tmp_path: Path) -> None:
    write_documents(tmp_path / "train.jsonl", [f"document {number}" for number in range(5)])
    assert read_documents(f"datasets:{tmp_path}", limit=3)[-1] == "document 2"


def test_a_dataset_is_not_read_whole(
    datasets_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "DATASET_CHARACTERS", 4)
    assert read_documents(f"datasets:{datasets_folder}") == ["one", "two"]


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("#validation", "Available splits: .*train"),
        (":german", "german"),
        ("@title", r"columns: text, body, rank.*name one of text, body with @COLUMN"),
        ("@rank", "holds int64 values"),
        ("#train#test", r"OWNER/NAME\[:CONFIG\]"),
    ],
)
def test_dataset_refusals(datasets_folder: Path, ending: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_documents(f"datasets:{datasets_folder}{ending}")
    assert "\n" not in str(caught.value)


def test_datasets_run_no_code_and_need_the_hub_for_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "loader" / "loader.py"
    script.parent.mkdir()
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="scripts are no longer supported"):
        read_documents(f"datasets:{script.parent}")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nobody/nothing"):
        read_documents("datasets:nobody/nothing")
    with pytest.raises(InputError, match="OWNER/NAME"):
        read_documents("datasets:json")


def test_a_hub_id_without_prefix_is_told_how_to_write_it() -> None:
    with pytest.raises(InputError, match="write datasets:nobody/nothing"):
        read_documents("nobody/nothing")
    for path in ("nobody/nothing.txt", "/nobody/nothing", "nobody"):
        with pytest.raises(InputError, match=r"none$"):
            read_documents(path)
    with pytest.raises(InputError, match="at least 1"):
        read_documents("nobody", limit=0)


def test_digest_names_documents_and_their_borders() -> None:
    assert digest_documents(["ab", "c"]) == digest_documents(iter(["ab", "c"]))
    others = (["a", "bc"], ["c", "ab"], ["abc"], ["ab", "c", ""])
    assert len({digest_documents(["ab", "c"]), *map(digest_documents, others)}) == 5


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


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=5), st.integers(4, 40))
def test_packed_windows_hold_every_document_whole(
    world: Any, texts: list[str], context: int
) -> None:
    windows = packed_windows(world.tokenizer, texts, context, minimum=1)
    bos, eos = world.tokenizer.bos_token_id, world.tokenizer.eos_token_id
    assert bool(windows.mask_WC[:-1].all())
    assert (windows.ids_WC[:, 0] == bos).all()
    assert int(windows.bytes_W.sum()) == sum(len(text.encode()) for text in texts)
    if max(len(text.encode()) for text in texts) < context - 2:
        ids = windows.ids_WC[windows.mask_WC.bool()].tolist()
        found = world.tokenizer.decode([id for id in ids if id != bos]).split("<eos>")
        assert sorted(found) == sorted([*texts, ""])
    assert ids_of(windows).count(eos) == len(texts)


def ids_of(windows: Any) -> list[int]:
    return windows.ids_WC[windows.mask_WC.bool()].tolist()


def test_packed_windows_are_full_and_come_from_every_document(world: Any) -> None:
    texts = ["alpha beta gamma " * 500, *["one two three"] * 20, "red green blue " * 300]
    windows = packed_windows(world.tokenizer, texts, 16, limit=12)
    assert windows.ids_WC.shape == (12, 16) and bool(windows.mask_WC.all())
    shown = world.tokenizer.decode(ids_of(windows))
    assert all(word in shown for word in ("alpha", "three", "green"))
    other = packed_windows(world.tokenizer, texts, 16, limit=12, seed=1)
    again = packed_windows(world.tokenizer, iter(texts), 16, limit=12)
    assert windows.ids_WC.equal(again.ids_WC) and not windows.ids_WC.equal(other.ids_WC)


def test_a_window_names_the_document_it_starts_with(world: Any) -> None:
    texts = ["alpha beta " * 30, "one two three " * 30]
    windows = packed_windows(world.tokenizer, texts, 32)
    for document, ids in zip(windows.document_W.tolist(), windows.ids_WC, strict=True):
        start = world.tokenizer.decode(ids[1:4])
        assert any(word in texts[document] for word in start.split())


def test_packing_tokenises_no_more_than_it_needs(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    tokenise = type(world.tokenizer).__call__

    def count(self: Any, text: str, **keywords: Any) -> Any:
        read.append(len(text))
        return tokenise(self, text, **keywords)

    monkeypatch.setattr(type(world.tokenizer), "__call__", count)
    packed_windows(world.tokenizer, ["alpha beta gamma " * 10000] * 10, 32, limit=5)
    assert sum(read) < 5 * 32 * 10


def test_packing_without_special_tokens(world: Any) -> None:
    tokenizer = copy.deepcopy(world.tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    texts = ["alpha beta gamma delta"] * 9
    windows = packed_windows(tokenizer, texts, 16)
    first = sum(len(tokenizer.decode(ids[:1])) for ids in windows.ids_WC)
    kept = tokenizer.decode(ids_of(windows))
    assert set(kept.replace(" ", "")) == set("".join(texts).replace(" ", ""))
    assert int(windows.bytes_W.sum()) == len(kept) - first


def test_packing_too_little_text(world: Any) -> None:
    with pytest.raises(InputError, match="at least 8 tokens"):
        packed_windows(world.tokenizer, ["a", "b"], 16)
    assert len(packed_windows(world.tokenizer, ["a b c d e f"] * 2, 4)) > 1
