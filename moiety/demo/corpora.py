"""The demo's four domains, each split by document into train, calibration and held-out text.

Documents are taken in the order of a hash. The first go to held-out, the next to calibration,
the others to train; whatever repeats text already taken is left out, so that no split holds a
near-copy of another's documents.
"""

import json
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from moiety.demo.arithmetic import arithmetic_documents, exact_match_problems
from moiety.demo.sizes import DOMAINS, DemoSize
from moiety.demo.sources import TEXT_DOMAINS, clean_documents, raw_documents
from moiety.errors import InputError
from moiety.files import digest
from moiety.text import write_documents

SPLITS = ("heldout", "calibration", "train")
PROBLEMS = Path("arithmetic", "problems.jsonl")
_CHARACTERS_A_TOKEN = {"python": 3.4, "cpp": 3.1, "english": 4.2, "arithmetic": 1.25}
_RAW_EXCESS = {"python": 2.4, "cpp": 2.2, "english": 3.6}
_BLOCK = re.compile(r"\n\s*\n")
_SHORTEST_BLOCK = 60
_SHINGLE = 5
_SAMPLED = 4
_MOST_REPEATED = 0.3


def read_sources(size: DemoSize, seed: int) -> dict[str, list[str]]:
    """Read enough raw text of every text domain for a size; InputError when a source is missing."""
    return {
        domain: raw_documents(
            domain,
            seed=seed,
            budget=round(sum(budgets(size, domain).values()) * _RAW_EXCESS[domain]),
            cap=3 * size.document_characters,
        )
        for domain in TEXT_DOMAINS
    }


def sources_digest(sources: dict[str, list[str]]) -> str:
    """Name what was read by its content."""
    return digest(sources)


def write_corpora(folder: Path, size: DemoSize, seed: int, sources: dict[str, list[str]]) -> None:
    """Write `<domain>/{train,calibration,heldout}.jsonl` and the arithmetic problems to `folder`.

    Raises InputError when a domain has too little text to fill its splits.
    """
    for domain in DOMAINS:
        splits = (
            arithmetic_splits(size, seed)
            if domain == "arithmetic"
            else text_splits(domain, sources[domain], size)
        )
        (folder / domain).mkdir(parents=True)
        for split, documents in splits.items():
            write_documents(folder / domain / f"{split}.jsonl", documents)
    problems = exact_match_problems(
        random.Random(f"{seed}:problems"), seed=seed, count=size.problems
    )
    lines = (json.dumps(problem) + "\n" for problem in problems)
    (folder / PROBLEMS).write_text("".join(lines), encoding="utf-8")


def budgets(size: DemoSize, domain: str) -> dict[str, int]:
    """The characters that each split of a domain should hold."""
    tokens = {
        "heldout": size.heldout_tokens,
        "calibration": size.calibration_tokens,
        "train": size.train_tokens,
    }
    return {split: round(count * _CHARACTERS_A_TOKEN[domain]) for split, count in tokens.items()}


def arithmetic_splits(size: DemoSize, seed: int) -> dict[str, list[str]]:
    """Generated documents; only the held-out ones hold problems that are set aside."""
    return {
        split: arithmetic_documents(
            random.Random(f"{seed}:{split}"),
            seed=seed,
            characters=characters,
            set_aside=split == "heldout",
        )
        for split, characters in budgets(size, "arithmetic").items()
    }


def text_splits(domain: str, raw: list[str], size: DemoSize) -> dict[str, list[str]]:
    """Clean documents and deal them out, held-out first, without anything said twice."""
    documents = clean_documents(domain, raw, size.document_characters)
    unrepeated = iter(without_repeats(documents))
    splits: dict[str, list[str]] = {}
    for split, characters in budgets(size, domain).items():
        splits[split] = _take(unrepeated, characters)
        if sum(map(len, splits[split])) < characters // 2:
            raise InputError(
                f"expected about {characters} characters of {domain} for {split}, but this "
                f"machine's sources have only {sum(map(len, splits[split]))} left; "
                "use a smaller demo, or give your own corpora"
            )
    return splits


def _take(documents: Iterator[str], characters: int) -> list[str]:
    taken, size = [], 0
    while size < characters and (document := next(documents, None)) is not None:
        taken.append(document)
        size += len(document)
    return taken


def without_repeats(documents: list[str]) -> list[str]:
    """Leave out blocks met before, and documents that mostly repeat what the earlier ones say.

    A document repeats when over 30 % of its sampled shingles (five words in a row; Broder 1997)
    occur in the documents kept before it, all of them together.
    """
    kept: list[str] = []
    blocks: set[str] = set()
    shingles: set[int] = set()
    for document in documents:
        text, own_blocks = _new_blocks(document, blocks)
        own_shingles = sampled_shingles(text)
        repeated = len(own_shingles & shingles)
        if own_shingles and repeated <= _MOST_REPEATED * len(own_shingles):
            kept.append(text)
            blocks |= own_blocks
            shingles |= own_shingles
    return kept


def _new_blocks(document: str, known: set[str]) -> tuple[str, set[str]]:
    parts = _BLOCK.split(document)
    keys = [" ".join(part.split()).lower() for part in parts]
    fresh = [
        part
        for part, key in zip(parts, keys, strict=True)
        if len(key) < _SHORTEST_BLOCK or key not in known
    ]
    long = {key for key in keys if len(key) >= _SHORTEST_BLOCK}
    return (document if len(fresh) == len(parts) else "\n\n".join(fresh)), long


def sampled_shingles(text: str) -> set[int]:
    """Hashes of every five words in a row, about one in four of them, the same ones always."""
    words = re.findall(r"\w+", text.lower())
    hashes = (
        zlib.crc32(" ".join(words[start : start + _SHINGLE]).encode())
        for start in range(len(words) - _SHINGLE + 1)
    )
    return {value for value in hashes if value % _SAMPLED == 0}
