"""Imports go one way, nothing leaks under a bare name, files stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("experts", "routers", "compose", "analysis")
SHARED = {"version", "errors", "progress", "files", "documents", "text", "training_state"}
SHARED |= {"compiled", "scoring", "units"}
MAY_IMPORT = {
    "shared": SHARED,
    "experts": SHARED | {"experts"},
    "routers": SHARED | {"routers"},
    "compose": SHARED | {"experts", "routers", "compose"},
    "analysis": SHARED | {"experts", "routers", "compose", "analysis"},
}
LONGEST_FILE = 400
LONGEST_FUNCTION = 60


def sources() -> list[Path]:
    """Every Python file of the package."""
    return sorted(p for folder in ("moiety", *FOLDERS) for p in (ROOT / folder).rglob("*.py"))


def layer(path: Path) -> str | None:
    """The layer a file belongs to; None for the package root's own (cli, console, demo)."""
    folder, *rest = path.relative_to(ROOT).parts
    if folder in FOLDERS:
        return folder
    return "shared" if Path(rest[0]).stem in SHARED else None


def imported(path: Path) -> Iterator[str]:
    """Dotted names of every import statement of a file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports from moiety in full"
            assert node.module is not None
            if node.module == "moiety":
                yield from (f"moiety.{name.name}" for name in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    where = layer(path)
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in FOLDERS, f"write moiety.{name}"
        if where is not None and parts[0] == "moiety" and len(parts) > 1:
            assert parts[1] in MAY_IMPORT[where], f"{where} may not import {name}"


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles the function: the body of a kernel may be long."""
    return any(ast.unparse(each).startswith("triton.jit") for each in node.decorator_list)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


def test_type_checkers_see_every_module() -> None:
    links = {path.name for path in (ROOT / "typings" / "moiety").iterdir()}
    modules = {p.name for p in (ROOT / "moiety").iterdir() if p.suffix == ".py" or p.is_dir()}
    modules.discard("__pycache__")
    assert links == modules | set(FOLDERS)
    assert all((ROOT / "typings" / "moiety" / name).exists() for name in links)


def test_bare_names_do_not_leak(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, moiety.compose, moiety.analysis, sys\n"
        f"leaked = [n for n in {FOLDERS} if u.find_spec(n) or n in sys.modules]\n"
        "sys.exit(f'leaked: {leaked}' if leaked else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_moiety_is_light(tmp_path: Path) -> None:
    code = "import moiety, moiety.cli, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == 0
