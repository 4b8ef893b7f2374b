"""The command line: what it prints, its exit codes, and what it refuses."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moiety.cli import main
from moiety.version import __version__

GOLDEN = Path(__file__).with_name("golden")


def moiety(*arguments: object, code: int = 0, cwd: Path | None = None) -> tuple[str, str]:
    """Run the command line in this process; gives stdout and stderr."""
    out, log = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(log),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit) as stopped,
    ):
        patch.setattr(sys, "argv", ["moiety", *map(str, arguments)])
        patch.setenv("COLUMNS", "100")
        main()
    assert stopped.value.code == code, out.getvalue() + log.getvalue()
    return out.getvalue(), log.getvalue()


def installed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed script in a process of its own."""
    command = [str(Path(sys.executable).with_name("moiety")), *arguments]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def built(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    world.write_recipe(folder / "recipe.yaml")
    out, log = moiety("build", folder / "recipe.yaml", "--out", folder / "composite")
    assert "trainable parameters (the gates)" in out and "192" in out
    assert "expert-letters" in log and "Traceback" not in log
    return folder / "composite"


def data(world: Any, kind: str) -> list[str]:
    return [f"--data={name}={texts[kind]}" for name, texts in world.texts.items()]


def test_help_reads_like_a_table_of_contents() -> None:
    shown = re.sub(r"[ \t]+$", "", installed("--help").stdout, flags=re.M)
    assert shown == (GOLDEN / "help.txt").read_text()


def test_version() -> None:
    assert installed("--version").stdout == f"moiety {__version__}\n"


def test_prune_eval_trace_and_report(world: Any, built: Path, tmp_path: Path) -> None:
    text = world.texts["letters"]["calibration"]
    options = ["--data", text, "--context-length", 32, "--windows", 8]
    out, _ = moiety("prune", world.finetunes["letters"], "--out", tmp_path / "p", *options)
    assert "model.layers.1.mlp.down_proj" in out and "2:4 on all" in out
    held = data(world, "heldout")
    out, _ = moiety("eval", built, *held, "--context-length", 32, "--windows", 4, "--json")
    results = json.loads(out)
    assert results["loss"].keys() >= {"composite", "uniform", "random", "oracle"}
    assert results["context_length"] == 32 and results["seed"] == 0
    moiety("trace", built, *held, "--out", tmp_path / "t", "--context-length", 32)
    out, log = moiety("report", tmp_path / "t", "--out", tmp_path / "report.html")
    assert "letters" in out and "report.html" in log
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    out, log = moiety("report", tmp_path / "t", "--terminal")
    assert "Methods and caveats" in out and "wrote" not in log
    moiety("report", tmp_path / "t", tmp_path / "t", "--out", tmp_path / "both.md")
    assert "The same tokens" in (tmp_path / "both.md").read_text()


def test_plan_of_a_composite_and_of_its_recipe(built: Path) -> None:
    out, _ = moiety("plan", built, "--gpu", "16GB", "--bandwidth", "500GB/s")
    assert "experts" in out and "2:4 int4" in out and "yes" in out
    recipe = json.loads(moiety("plan", built.with_name("recipe.yaml"), "--json")[0])
    composite = json.loads(moiety("plan", built, "--json")[0])
    assert recipe["experts"] == composite["experts"] == 3
    assert recipe["uses"][0]["weights"] == composite["uses"][0]["weights"]


def test_route_prints_exactly_the_gates(world: Any, built: Path) -> None:
    options = ["--context-length", 32, "--train-steps", 1, "--json"]
    out, _ = moiety("route", built, *data(world, "calibration"), *options)
    assert json.loads(out)["parameters"] == 2 * 3 * 32


def test_an_error_is_one_paragraph_and_names_the_thing(world: Any, tmp_path: Path) -> None:
    bad = world.write_recipe(tmp_path / "bad.yaml", prunes={"pattern": "2:4"})
    out, log = moiety("build", bad, "--out", tmp_path / "out", code=2)
    assert out == ""
    assert log.startswith("error: ") and "unknown field prunes; did you mean prune?" in log
    assert "Traceback" not in log
    debugged = installed("build", str(bad), "--out", str(tmp_path / "out"), "--debug")
    assert debugged.returncode == 2 and "Traceback" in debugged.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "MODEL", "--data", "letters", "--out", "t"], "--data must look like NAME=FILE"),
        (["trace", "MODEL", "--data", "letters=no.txt", "--out", "t"], "no.txt, but there is none"),
        (["trace", "nowhere/at/all", "--data", "a=TEXT", "--out", "t"], "expected a model folder"),
        (["eval", "MODEL", "--data", "poetry=TEXT"], "domains named like the experts"),
        (
            ["route", "MODEL", "--data", "letters=TEXT", "--init", "magic"],
            "--init: input should be",
        ),
        (["report", "nowhere"], "nowhere"),
        (["prune", "BASE", "--out", "p", "--data", "TEXT", "--pattern", "4:2"], "fewer than all"),
        (["prune", "BASE", "--out", "p"], "data"),
        (["prune", "BASE", "BASE", "--out", "p", "--data", "TEXT"], "expected NAME=MODEL for each"),
        (["prune", "../a=BASE", "--out", "p", "--data", "../a=TEXT"], "that can be folders"),
        (
            ["prune", "BASE", "--out", "p", "--data", "TEXT", "--best", "--method", "ria"],
            "not both",
        ),
        (["compose"], "No such command 'compose'"),
    ],
)
def test_wrong_input_ends_with_code_two(
    world: Any, built: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {
        "MODEL": str(built),
        "BASE": str(world.base),
        "TEXT": str(world.texts["letters"]["heldout"]),
    }
    for name, path in places.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    _, log = moiety(*arguments, code=2, cwd=tmp_path)
    assert message in " ".join(log.replace("│", " ").split())
    assert "Traceback" not in log
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_named(world: Any, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    recipe = world.write_recipe(tmp_path / "recipe.yaml")
    _, log = moiety("build", recipe, "--out", tmp_path / "locked" / "out", code=2)
    assert "locked" in log


def test_output_under_a_file_is_named(world: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = world.write_recipe(tmp_path / "recipe.yaml")
    _, log = moiety("build", recipe, "--out", tmp_path / "file" / "out", code=2)
    assert "expected to be able to write" in log
