"""The four domains: the same every time, split by document, nothing said in two splits."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from moiety.demo import sources
from moiety.demo.arithmetic import problems
from moiety.demo.cleaning import LICENCE, clean_cpp, clean_prose, clean_python
from moiety.demo.corpora import (
    PROBLEMS,
    SPLITS,
    read_sources,
    sampled_shingles,
    text_splits,
    without_repeats,
    write_corpora,
)
from moiety.demo.models import DOMAINS, DemoModels, DemoSize
from moiety.errors import InputError
from moiety.files import digest_of_folder
from moiety.text import read_documents

TEXT = "".join(f"word{number} follows word{number + 1} here\n" for number in range(60))


def _problem_lines(corpora: Path, split: str) -> set[str]:
    documents = read_documents(corpora / "arithmetic" / f"{split}.jsonl")
    return {line for document in documents for line in document.splitlines()}


def test_same_seed_gives_same_bytes(models: DemoModels, tiny: DemoSize, tmp_path: Path) -> None:
    write_corpora(tmp_path / "again", tiny, 0, read_sources(tiny, 0))
    assert digest_of_folder(tmp_path / "again") == digest_of_folder(models.corpora)


def test_another_seed_gives_other_documents(models: DemoModels, tiny: DemoSize) -> None:
    raw = read_sources(tiny, 1)["python"]
    other = text_splits("python", raw, tiny)["heldout"]
    assert other != read_documents(models.corpora / "python" / "heldout.jsonl")


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_split_has_text(models: DemoModels, tiny: DemoSize, domain: str) -> None:
    for split in SPLITS:
        documents = read_documents(models.corpora / domain / f"{split}.jsonl")
        assert max(map(len, documents)) <= tiny.document_characters
        assert sum(map(len, documents)) >= 2_000


@pytest.mark.parametrize("domain", ["python", "cpp", "english"])
def test_no_split_repeats_another(models: DemoModels, domain: str) -> None:
    texts = {split: read_documents(models.corpora / domain / f"{split}.jsonl") for split in SPLITS}
    heldout = set().union(*map(sampled_shingles, texts["heldout"]))
    for document in texts["train"] + texts["calibration"]:
        own = sampled_shingles(document)
        assert document not in texts["heldout"]
        assert len(own & heldout) <= 0.3 * len(own)


@pytest.mark.parametrize("domain", ["python", "cpp", "english"])
def test_no_licence_is_left(models: DemoModels, domain: str) -> None:
    for split in SPLITS:
        for document in read_documents(models.corpora / domain / f"{split}.jsonl"):
            assert not LICENCE.search(document)


def test_licence_comments_go_and_others_stay() -> None:
    python = "# Copyright 2020 Somebody\n# free to use\n\n# why\nimport os\n"
    assert clean_python(python) == "# why\nimport os\n"
    cpp = "/* Licensed under X.\n * more */\n// kept\nint a;\n// (c) 2020 B\n// more\n"
    assert clean_cpp(cpp) == "// kept\nint a;\n"


def test_prose_keeps_sentences_only() -> None:
    sentence = "This is a sentence that you can read in the [guide](https://x.y) of the tool."
    markdown = f"# Title\n![badge](b.svg)\n\n{sentence}\n\n```\ncode\n```\n\n| a | b |\n|---|---|\n"
    expected = "This is a sentence that you can read in the guide of the tool.\n"
    assert clean_prose(markdown) == expected


def test_near_copies_are_left_out() -> None:
    near = TEXT.replace("word7 ", "other ")
    assert without_repeats([TEXT, near, TEXT]) == [TEXT]


def test_blocks_met_before_are_left_out() -> None:
    shared = "This block of text stands in two documents, word for word, and is long enough."
    other = TEXT.replace("word", "item")
    first, second = without_repeats([f"{TEXT}\n\n{shared}", f"{other}\n\n{shared}"])
    assert shared in first
    assert shared not in second


def test_arithmetic_is_right(models: DemoModels) -> None:
    for split in SPLITS:
        for line in _problem_lines(models.corpora, split):
            first, sign, second, answer = re.fullmatch(
                r"(\d+) ([-+*]) (\d+) = (\d+)", line
            ).groups()  # pyright: ignore[reportOptionalMemberAccess]
            results = {"+": int(first) + int(second), "-": int(first) - int(second)}
            assert int(answer) == results.get(sign, int(first) * int(second))


def test_prompts_ask_new_questions_of_known_tables(models: DemoModels, tiny: DemoSize) -> None:
    rows = [json.loads(line) for line in (models.corpora / PROBLEMS).read_text().splitlines()]
    kept = {line for level in problems(0, False) for line in level}
    texts = [
        text
        for split in ("train", "calibration")
        for text in read_documents(models.corpora / "arithmetic" / f"{split}.jsonl")
    ]
    asked = {row["prompt"].splitlines()[-1] + row["answer"] for row in rows}
    assert len(asked) == tiny.problems and asked <= kept
    for row in rows:
        assert not any(row["prompt"] in text for text in texts)
        lines = (row["prompt"] + row["answer"]).splitlines()
        assert lines[-1] not in lines[:-1]


def test_held_out_problems_are_never_trained_on(models: DemoModels) -> None:
    aside = {line for level in problems(0, True) for line in level}
    kept = {line for level in problems(0, False) for line in level}
    assert aside.isdisjoint(kept)
    assert _problem_lines(models.corpora, "heldout") <= aside
    assert _problem_lines(models.corpora, "train") <= kept
    assert _problem_lines(models.corpora, "calibration") <= kept


def test_missing_source_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "python_folder", lambda: tmp_path)
    with pytest.raises(InputError, match="Python standard library in"):
        sources.raw_documents("python", seed=0, budget=1_000, cap=1_000)


def test_too_little_text_is_named(tiny: DemoSize) -> None:
    with pytest.raises(InputError, match="characters of english for heldout"):
        text_splits("english", ["Too little."], tiny)


def test_too_many_problems_are_refused(tiny: DemoSize, tmp_path: Path) -> None:
    empty = replace(tiny, problems=10**6)
    with pytest.raises(InputError, match="arithmetic problems"):
        write_corpora(tmp_path / "corpora", empty, 0, read_sources(tiny, 0))
