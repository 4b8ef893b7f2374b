"""Complete or absent, never half-written."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moiety import files
from moiety.errors import InputError, OutputError
from moiety.files import (
    check_new_folder,
    digest_of_file,
    digest_of_folder,
    new_folder,
    read_json,
    write_json,
)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as scratch:
        (scratch / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a") as scratch:
        (scratch / "x").write_text("1")
        raise RuntimeError
    with pytest.raises(RuntimeError), new_folder(tmp_path / "b" / "c" / "a"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_check_makes_nothing(tmp_path: Path) -> None:
    check_new_folder(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("1")
    with pytest.raises(OutputError, match="able to write in"):
        check_new_folder(tmp_path / "file" / "b" / "c")


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal\nfrom moiety.files import new_folder\n"
        f"with new_folder(pathlib.Path({str(tmp_path / 'a')!r})) as s:\n"
        "    (s / 'x').write_text('1'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    mine = tmp_path / f".a.{os.getpid()}.kept"
    mine.mkdir()
    with new_folder(tmp_path / "a"):
        assert len(list(tmp_path.glob(".a.*"))) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [mine.name, "a"]


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("1")
    with pytest.raises(OutputError, match="holds files"), new_folder(tmp_path / "a"):
        pass
    (tmp_path / "f").write_text("1")
    with pytest.raises(OutputError, match="is a file"), new_folder(tmp_path / "f"):
        pass


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match=r"b\.json"):
        read_json(tmp_path / "b.json")
    with pytest.raises(InputError, match="there is none"):
        read_json(tmp_path / "c.json")


def test_digest_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = digest_of_folder(tmp_path)
    (tmp_path / "a").write_text("2")
    second = digest_of_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, digest_of_folder(tmp_path)}) == 3


def test_a_file_is_read_for_its_digest_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when a change in place leaves size, inode and time of modification as they were."""
    path, read = tmp_path / "a", []
    digest_of_content = files._digest_of_content

    def counted(file: Path) -> str:
        read.append(file)
        return digest_of_content(file)

    monkeypatch.setattr(files, "_digest_of_content", counted)
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0.0)
    path.write_text("one")
    first = digest_of_file(path)
    assert digest_of_file(path) == first and len(read) == 1
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    time.sleep(0.05)
    path.write_text("two")
    os.utime(path, ns=times)
    assert digest_of_file(path) != first and len(read) == 2
    path.rename(tmp_path / "b")
    (tmp_path / "a").write_text("one")
    assert digest_of_file(path) == first


def test_a_file_that_was_just_written_is_read_every_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    seen = set()
    for number in range(100):
        path.write_text(f"{number:03}")
        seen.add(digest_of_file(path))
    assert len(seen) == 100
