"""The demo's base and finetunes, trained once and kept under a name that says what made them.

Corpora, tokenizer, base and each finetune are folders of their own whose names hold a digest of
their settings and of what they were made from. A folder exists only once it is whole, so that an
interrupted preparation goes on after its last finished piece.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moiety.demo.corpora import read_sources, sources_digest, write_corpora
from moiety.demo.sizes import DOMAINS, FULL, QUICK, DemoSize
from moiety.demo.tokenizer import train_tokenizer
from moiety.demo.train import train_base, train_finetune
from moiety.files import digest, new_folder
from moiety.progress import SILENT, Progress

__all__ = ["DOMAINS", "FULL", "QUICK", "DemoModels", "DemoSize", "default_cache", "prepare"]

_RECIPE = 2
"""Raised whenever the code makes other bytes from the same settings and sources."""

_CORPUS_SETTINGS = (
    "train_tokens",
    "calibration_tokens",
    "heldout_tokens",
    "document_characters",
    "problems",
)
_MODEL_SETTINGS = (
    "hidden",
    "intermediate",
    "layers",
    "heads",
    "context_length",
    "rows",
    "base_steps",
    "matrix_rate",
    "vector_rate",
)
_FINETUNE_SETTINGS = ("finetune_steps", "finetune_share")


@dataclass(frozen=True)
class DemoModels:
    """Where the demo's models are: the base, a finetune for each domain, and their corpora."""

    base: Path
    finetunes: dict[str, Path]
    corpora: Path


def default_cache() -> Path:
    """The folder of the user's cache for demo models."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    return folder / "moiety" / "demo"


def prepare(
    size: DemoSize,
    *,
    seed: int = 0,
    cache: Path | None = None,
    fresh: bool = False,
    progress: Progress = SILENT,
) -> DemoModels:
    """Give the base, the finetunes and the corpora of a demo size, making what is not cached.

    `fresh` makes everything again. The same size, seed and installed files give the same bytes.
    Raises InputError when a text source is missing, OutputError when the cache cannot be written.
    """
    store = _Store(cache or default_cache(), fresh)
    progress.note("read the text sources")
    sources = read_sources(size, seed)
    inputs = {"recipe": _RECIPE, "seed": seed, "sources": sources_digest(sources)}

    key = digest([inputs, _settings(size, _CORPUS_SETTINGS)])
    corpora = store.get(
        f"{size.name}-corpora-{key}", partial(write_corpora, size=size, seed=seed, sources=sources)
    )
    key = digest([key, size.vocabulary, size.context_length])
    tokenizer = store.get(
        f"{size.name}-tokenizer-{key}",
        partial(
            train_tokenizer,
            corpora=corpora,
            domains=DOMAINS,
            vocabulary=size.vocabulary,
            context_length=size.context_length,
        ),
    )
    train = {"size": size, "seed": seed, "corpora": corpora, "progress": progress}
    key = digest([key, _settings(size, _MODEL_SETTINGS)])
    base = store.get(f"{size.name}-base-{key}", partial(train_base, tokenizer=tokenizer, **train))
    key = digest([key, _settings(size, _FINETUNE_SETTINGS)])
    finetunes = {
        domain: store.get(
            f"{size.name}-{domain}-{key}",
            partial(train_finetune, domain=domain, base=base, **train),
        )
        for domain in DOMAINS
    }
    return DemoModels(base=base, finetunes=finetunes, corpora=corpora)


def _settings(size: DemoSize, names: tuple[str, ...]) -> dict[str, object]:
    return {name: getattr(size, name) for name in names}


@dataclass(frozen=True)
class _Store:
    root: Path
    fresh: bool

    def get(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder of that name, made first where it is absent or a fresh one is wanted."""
        final = self.root / name
        if self.fresh:
            _discard(final)
        if final.is_dir():
            return final
        try:
            with new_folder(final) as folder:
                make(folder)
        except OSError:
            if not final.is_dir():
                raise
        return final


def _discard(folder: Path) -> None:
    if folder.is_dir():
        doomed = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        folder.rename(doomed / "old")
        shutil.rmtree(doomed)
