"""`moiety recipe init` and `moiety build --dry-run`: from folders to a plan, nothing written."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from moiety.cli import app
from moiety.compose import Recipe
from moiety.errors import InputError, OutputError


def moiety(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def init(world: Any, out: Path, *options: object) -> Any:
    data = [f"--data={name}={texts['calibration']}" for name, texts in world.texts.items()]
    return moiety("recipe", "init", *world.finetunes.values(), "--out", out, *data, *options)


def test_from_folders_to_a_plan(world: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    made = init(world, recipe, "--base", world.base, "--kind", "routed")
    assert made.exit_code == 0 and "wrote" in made.stderr, made.output
    assert Recipe.read(recipe).names == list(world.finetunes)
    recipe.write_text(recipe.read_text().replace("context_length: 512", "context_length: 32"))
    shown = moiety("build", recipe, "--out", tmp_path / "out", "--dry-run")
    assert shown.exit_code == 0, shown.output
    for part in ("expert-letters", "shared", "route", "all that is left", "are estimates"):
        assert part in shown.stdout
    assert "note: no held-out text for letters, numbers, colours" in shown.stderr
    told = moiety("build", recipe, "--out", tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(told.stdout)
    assert plan["kind"] == "routed" and plan["estimated_seconds"] > 0 and plan["notes"]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_dry_run_says_why_not(world: Any, tmp_path: Path) -> None:
    init(world, tmp_path / "recipe.yaml")
    assert "BASE" in (tmp_path / "recipe.yaml").read_text()
    failed = moiety("build", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--dry-run")
    assert isinstance(failed.exception, InputError)
    assert "base: expected a model folder or a hub id" in str(failed.exception)
    taken = moiety("build", tmp_path / "recipe.yaml", "--out", world.base, "--dry-run")
    assert isinstance(taken.exception, OutputError) and "holds files" in str(taken.exception)


def test_a_mergekit_file_and_text_for_it(world: Any, tmp_path: Path) -> None:
    experts = "".join(
        f"  - source_model: {folder}\n    positive_prompts: [{name}]\n"
        for name, folder in world.finetunes.items()
    )
    file = tmp_path / "moe.yaml"
    file.write_text(f"base_model: {world.base}\ngate_mode: hidden\nexperts:\n{experts}")
    build = ("build", file, "--out", tmp_path / "out", "--dry-run")
    assert "give more" in str(moiety(*build).exception) or "none of 1 is" in str(
        moiety(*build).exception
    )
    long = tmp_path / "long.txt"
    long.write_text(" ".join(f"alpha {number}" for number in range(3000)))
    shown = moiety(*build, *(f"--data={name}={long}" for name in world.finetunes), "--json")
    assert shown.exit_code == 0, shown.exception
    assert json.loads(shown.stdout)["kind"] == "mixture"
    assert "share 1 calibration documents" in shown.stderr
