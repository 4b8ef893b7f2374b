"""Where the demo's text comes from: files that every machine with moiety on it has.

A source is read in an order fixed by a seed and by the files' relative names, so that the same
installation gives the same text wherever it lies.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moiety.demo.cleaning import clean_cpp, clean_prose, clean_python
from moiety.errors import InputError

TEXT_DOMAINS = ("python", "cpp", "english")
_CLEAN = {"python": clean_python, "cpp": clean_cpp, "english": clean_prose}
_PYTHON_LEFT_OUT = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "encodings",
        "__pycache__",
        "__phello__",
        "turtledemo",
        "msilib",
    ]
)
_PYTHON_SUFFIXES = frozenset({".py"})
_CPP_LEFT_OUT = frozenset({"ops", "cudnn", "miopen", "legacy"})
_CPP_SUFFIXES = frozenset({".h", ".hpp", ".cuh"})
_PROSE_SUFFIXES = frozenset({".md", ".rst"})
_PROSE_LEFT_OUT = frozenset({"__pycache__", "tests", "testing", "_vendor", "vendor"})
_DOCSTRING = re.compile(r'^[ \t]*r?"""(.*?)"""', re.MULTILINE | re.DOTALL)
_MODULES_READ = 900
_LARGEST_FILE = 400_000
_SHORTEST = 300


def hash_order(seed: int, name: str) -> str:
    """A sort key that shuffles names the same way on every machine."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def raw_documents(domain: str, *, seed: int, budget: int, cap: int) -> list[str]:
    """Read about `budget` characters of `python`, `cpp` or `english`, `cap` at most a file.

    Raises InputError when the source is not on this machine.
    """
    if domain == "python":
        texts = _files(
            python_folder(), _PYTHON_SUFFIXES, _PYTHON_LEFT_OUT, "Python standard library", seed
        )
    elif domain == "cpp":
        texts = _files(cpp_folder(), _CPP_SUFFIXES, _CPP_LEFT_OUT, "C++ headers of torch", seed)
    elif domain == "english":
        texts = _prose(seed)
    else:
        raise InputError(f"expected a domain among {TEXT_DOMAINS}, but got {domain!r}")
    taken, size = [], 0
    for text in texts:
        taken.append(cut(text, cap))
        size += len(taken[-1])
        if size >= budget:
            break
    return taken


def clean_documents(domain: str, raw: list[str], cap: int) -> list[str]:
    """Clean raw documents, `cap` characters at most each; leave out those with little text."""
    cleaned = (cut(_CLEAN[domain](text), cap) for text in raw)
    return [text for text in cleaned if len(text) >= _SHORTEST]


def cut(text: str, cap: int) -> str:
    """The first lines of `text` that fit in `cap` characters."""
    if len(text) <= cap:
        return text
    end = text.rfind("\n", 0, cap)
    return text[: end + 1] if end > 0 else text[:cap]


def python_folder() -> Path:
    """The folder of the standard library's source."""
    return Path(sysconfig.get_path("stdlib"))


def cpp_folder() -> Path:
    """The folder of the headers that the torch package brings."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise InputError("expected torch to be installed for its C++ headers, but it is not")
    return Path(found.origin).parent / "include"


def _files(
    folder: Path, suffixes: frozenset[str], left_out: frozenset[str], what: str, seed: int
) -> Iterator[str]:
    paths = found_files(folder, suffixes, left_out)
    if not paths:
        raise InputError(
            f"expected the {what} in {folder}, but there is no such file; install it, "
            "or give your own corpora instead of running the demo"
        )
    for name in sorted(paths, key=lambda name: hash_order(seed, name)):
        yield read(paths[name])


def found_files(
    folder: Path, suffixes: frozenset[str], left_out: frozenset[str]
) -> dict[str, Path]:
    """The files below a folder by relative name, without those below a folder left out."""
    found, endings = {}, tuple(suffixes)
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out]
        for name in names:
            if name.endswith(endings):
                path = Path(place, name)
                found[path.relative_to(folder).as_posix()] = path
    return found


def read(path: Path) -> str:
    """The text of a file of reasonable size; nothing for any other."""
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= _LARGEST_FILE else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _prose(seed: int) -> Iterator[str]:
    texts = topics() | _descriptions()
    files: dict[str, Path] = {}
    for folder in package_folders():
        files |= found_files(folder, _PROSE_SUFFIXES | {".py"}, _PROSE_LEFT_OUT)
    if not texts and not files:
        raise InputError(
            "expected documentation of installed distributions or pydoc topics, but there is "
            "none; install some packages, or give your own corpora instead of running the demo"
        )
    modules = sorted(
        (name for name in files if name.endswith(".py")), key=lambda name: hash_order(seed, name)
    )
    left_out = set(modules[_MODULES_READ:])
    for name in sorted({*texts, *files} - left_out, key=lambda name: hash_order(seed, name)):
        text = texts[name] if name in texts else read(files[name])
        yield _docstrings(text) if name.endswith(".py") else text


def package_folders() -> list[Path]:
    """The folders that hold the installed distributions."""
    paths = sysconfig.get_paths()
    return sorted({Path(paths["purelib"]), Path(paths["platlib"])})


def topics() -> dict[str, str]:
    """The chapters of the language reference that come with Python's help."""
    try:
        from pydoc_data.topics import topics as chapters
    except ImportError:
        return {}
    return {f"topic/{name}": text for name, text in chapters.items()}


def _docstrings(source: str) -> str:
    return "\n\n".join(match[1] for match in _DOCSTRING.finditer(source))


def _descriptions() -> dict[str, str]:
    texts = {}
    for distribution in importlib.metadata.distributions():
        headers: Any = distribution.metadata
        text = headers.get_payload() or headers.get("Description", "")
        texts[f"{headers['Name']}/METADATA"] = str(text)
    return texts
