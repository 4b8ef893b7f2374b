"""Where the demo's text comes from: files that every machine with moiety on it has.

A source yields cleaned documents in an order fixed by a seed and by the files' relative names,
so that the same installation gives the same text wherever it lies.
"""

import hashlib
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from moiety.demo.cleaning import clean_cpp, clean_prose, clean_python
from moiety.errors import InputError

_PYTHON_LEFT_OUT = frozenset(
    "site-packages dist-packages test tests idle_test lib2to3 pydoc_data encodings "
    "__pycache__ __phello__ turtledemo msilib".split()
)
_CPP_LEFT_OUT = frozenset({"ops", "cudnn", "miopen", "legacy"})
_CPP_SUFFIXES = frozenset({".h", ".hpp", ".cuh"})
_PROSE_SUFFIXES = frozenset({".md", ".rst"})
_SHORTEST = 300
_LARGEST_FILE = 400_000


def hash_order(seed: int, name: str) -> str:
    """A sort key that shuffles names the same way on every machine."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def source_documents(domain: str, *, seed: int, cap: int) -> Iterator[str]:
    """Yield the cleaned documents of the domain `python`, `cpp` or `english`.

    Each is cut to `cap` characters at a line's end. Raises InputError when the source is not on
    this machine or holds no text.
    """
    if domain == "python":
        raw = _files(python_folder(), {".py"}, _PYTHON_LEFT_OUT, "Python standard library", seed)
        return _cleaned(raw, clean_python, cap)
    if domain == "cpp":
        raw = _files(cpp_folder(), _CPP_SUFFIXES, _CPP_LEFT_OUT, "C++ headers of torch", seed)
        return _cleaned(raw, clean_cpp, cap)
    if domain == "english":
        return _cleaned(_prose(seed), clean_prose, cap)
    raise InputError(f"expected a domain among python, cpp and english, but got {domain!r}")


def python_folder() -> Path:
    """The folder of the standard library's source."""
    return Path(sysconfig.get_path("stdlib"))


def cpp_folder() -> Path:
    """The folder of the headers that the torch package brings."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise InputError("expected torch to be installed for its C++ headers, but it is not")
    return Path(found.origin).parent / "include"


def _cleaned(raw: Iterable[str], clean: Callable[[str], str], cap: int) -> Iterator[str]:
    for text in raw:
        document = cut(clean(text), cap)
        if len(document) >= _SHORTEST:
            yield document


def cut(text: str, cap: int) -> str:
    """The first lines of `text` that fit in `cap` characters."""
    if len(text) <= cap:
        return text
    end = text.rfind("\n", 0, cap)
    return text[: end + 1] if end > 0 else text[:cap]


def _files(
    folder: Path, suffixes: Iterable[str], left_out: frozenset[str], what: str, seed: int
) -> Iterator[str]:
    paths = [path for path in folder.rglob("*") if path.suffix in suffixes]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    wanted = [name for name in names if left_out.isdisjoint(name.split("/"))]
    if not wanted:
        raise InputError(
            f"expected the {what} in {folder}, but there is no such file; install it, "
            "or give your own corpora instead of running the demo"
        )
    for name in sorted(wanted, key=lambda name: hash_order(seed, name)):
        yield from _text(names[name])


def _text(path: Path) -> Iterator[str]:
    try:
        if path.stat().st_size <= _LARGEST_FILE:
            yield path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return


def _prose(seed: int) -> Iterator[str]:
    texts = {**_topics(), **_descriptions()}
    if not texts:
        raise InputError(
            "expected documentation of installed distributions and pydoc topics, but there is "
            "none; install some packages, or give your own corpora instead of running the demo"
        )
    for name in sorted(texts, key=lambda name: hash_order(seed, name)):
        yield texts[name]


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {f"topic/{name}": text for name, text in topics.items()}


def _descriptions() -> dict[str, str]:
    texts = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        body = distribution.metadata.get_payload()  # pyright: ignore[reportAttributeAccessIssue]
        texts[f"{name}/METADATA"] = str(body or distribution.metadata.get("Description") or "")
        for path in distribution.files or ():
            if path.suffix in _PROSE_SUFFIXES and ".dist-info" not in str(path):
                texts[f"{name}/{path}"] = "".join(_text(Path(str(distribution.locate_file(path)))))
    return texts
