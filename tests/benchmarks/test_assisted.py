"""Drafts for composites: the text stays the target's own, and what is accepted is counted."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moiety.compose import build, open_any
from moiety.errors import InputError
from moiety.files import read_json

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"prune": {"method": "magnitude", "refit_steps": 0}, "route": {"train_steps": 0}}


@pytest.fixture
def assisted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, which is no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.assisted")


@pytest.fixture(scope="module")
def folders(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A routed composite, and a sparse merge of the same finetunes."""
    folder = tmp_path_factory.mktemp("assisted")
    kinds: dict[str, dict[str, Any]] = {
        "routed": {"compose": {"kind": "routed", "shared": "base"}},
        "merge": {
            "compose": {"kind": "merge", "parameters": {"weight": 0.3}, "sparse": "reprune"},
        },
    }
    for name, changes in kinds.items():
        recipe = world.write_recipe(folder / f"{name}.yaml", **QUICK, **changes)
        build(recipe, folder / name, check=False)
    return {name: folder / name for name in kinds}


def test_the_text_is_the_targets_own_whatever_the_draft(
    assisted: Any, folders: dict[str, Path]
) -> None:
    target = open_any(folders["routed"])
    prompts = [torch.arange(3, 19)[None], torch.arange(40, 56)[None]]
    merge = assisted.measured(target.model, open_any(folders["merge"]).model, prompts, 3, 8)
    own = assisted.measured(target.model, open_any(folders["routed"]).model, prompts, 3, 8)
    for row in (merge, own):
        assert row["equal"] == 1.0 and row["tokens"] == 16
        assert row["accepted"] + row["passes"] == row["tokens"]
        assert row["accepted"] <= row["proposed"] <= 3 * row["passes"]
        assert row["acceptance"] == row["accepted"] / row["proposed"]
    assert own["acceptance"] == 1.0 and own["passes"] == 4
    assert merge["acceptance"] < 1.0
    assert "_get_candidate_generator" not in vars(target.model)


def test_it_takes_prompts_from_the_composites_recipe_and_writes_rows(
    assisted: Any,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "rows.json"
    command = ["assisted", str(folders["routed"]), str(folders["merge"]), "--quick"]
    monkeypatch.setattr(sys, "argv", [*command, "--drafted", "2", "--json", str(out)])
    assisted.main()
    written = read_json(out)
    assert [row["case"] for row in written["rows"]] == [
        "letters: merge",
        "numbers: merge",
        "colours: merge",
    ]
    assert all(row["seconds"] > 0 and row["ratio"]["plain"] > 0 for row in written["rows"])
    shown = capsys.readouterr().out
    assert "threads" in written["device"] and "(" + written["device"].split(",")[0] in shown
    assert "plain s / assisted s" in shown


def test_prompts_must_be_named_and_long_enough(
    assisted: Any, folders: dict[str, Path], world: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="holds no recipe"):
        assisted.texts_of(world.base, [])
    with pytest.raises(InputError, match="NAME=FILE, but it is letters"):
        assisted.texts_of(world.base, ["letters"])
    assert assisted.texts_of(world.base, ["a=b.txt"]) == {"a": "b.txt"}
    short = tmp_path / "short.txt"
    short.write_text("alpha beta")
    with pytest.raises(InputError, match="a document of 64 tokens"):
        assisted.prompts(open_any(folders["merge"]), {"a": short}, 1, 64)
