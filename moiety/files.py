"""Files and folders that are either complete or absent: write beside, fsync, rename."""

import contextlib
import functools
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moiety.errors import InputError, OutputError

SETTLED_SECONDS = 2.0
"""Age of a file's last change from which a later one is sure to show in its times."""
KEPT_DIGESTS = 4096


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Give a scratch folder beside `final` that takes its name when the block ends without error.

    Parents that are missing are made, and removed again after an error. Raises OutputError when
    `final` exists and is not empty, or its parent cannot be written.
    """
    check_new_folder(final)
    _remove_leftovers(final)
    absent = [parent for parent in final.parents if not parent.exists()]
    check_writable(final.parent)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.{os.getpid()}.", dir=final.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        for path in scratch.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
            sync(path)
        if final.exists():
            final.rmdir()
        scratch.rename(final)
        sync(final.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if not final.exists():
            _remove_empty(absent)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders as long as they are empty, innermost first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _remove_leftovers(final: Path) -> None:
    """Remove the scratch folders of runs that were killed while they made `final`."""
    for scratch in final.parent.glob(f".{glob.escape(final.name)}.*.*"):
        owner = scratch.name.removeprefix(f".{final.name}.").partition(".")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(scratch, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_new_folder(final: Path) -> None:
    """Raise OutputError unless `final` can be made: absent or empty, parent writable.

    Nothing is made: where parents are missing, the nearest one that exists is tried.
    """
    if final.is_dir() and any(final.iterdir()):
        raise OutputError(
            f"expected {final} to be absent or empty, but it holds files; "
            "choose another output folder or remove it first"
        )
    if final.exists() and not final.is_dir():
        raise OutputError(f"expected {final} to be a folder, but it is a file; choose another name")
    _try_writing(next(parent for parent in final.absolute().parents if parent.exists()))


def check_writable(folder: Path) -> None:
    """Make `folder` if need be and raise OutputError unless a file can be written in it."""
    with _refused(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _try_writing(folder)


def _try_writing(folder: Path) -> None:
    with _refused(folder), tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Errors of the system as an OutputError that names the folder."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"expected to be able to write in {folder}, but: {error.strerror or error}; "
            "choose another output folder or change its permissions"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write `path` in one step: a reader sees the old file or the whole new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    scratch = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o644)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises InputError that names the file when it is absent or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"expected a JSON file at {path}, but there is none") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"expected JSON in {path}, but: {error}") from error


def digest(value: Any) -> str:
    """Name a JSON-like value by its content: 16 hexadecimal digits of SHA-256."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def digest_of_file(path: Path) -> str:
    """Name a file by its content: 16 hexadecimal digits of SHA-256.

    Read once by a process, as long as size, inode and times of change stay the same. A file that
    was changed a moment ago is read again: two changes within a tick of the clock look like one.
    """
    found = path.stat()
    changed = max(found.st_mtime_ns, found.st_ctime_ns)
    if time.time_ns() - changed < SETTLED_SECONDS * 1e9:
        return _digest_of_content(path)
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return _digest_of_settled(path.absolute(), found.st_dev, found.st_ino, found.st_size, times)


@functools.lru_cache(KEPT_DIGESTS)
def _digest_of_settled(
    path: Path, _device: int, _inode: int, _size: int, _times: tuple[int, int]
) -> str:
    return _digest_of_content(path)


def _digest_of_content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def digest_of_folder(folder: Path) -> str:
    """Name a folder by the relative names and contents of all its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest({str(path.relative_to(folder)): digest_of_file(path) for path in files})
