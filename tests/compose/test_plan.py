"""Plans: what a build says it will do, and that it is what the build then does."""

import json
from pathlib import Path
from typing import Any

import pytest

from moiety.compose import Recipe, build, default_work
from moiety.compose.plan import COLUMNS, Plan, plan
from moiety.files import read_json

EXPERTS = ["expert-letters", "expert-numbers", "expert-colours"]


def planned(world: Any, folder: Path, **changes: Any) -> Plan:
    return plan(Recipe.model_validate(world.recipe(**changes)), folder / "work")


def weights_of(folder: Path) -> int:
    """Bytes of the tensors stored in a folder, without the file's header."""
    total = 0
    for file in folder.glob("*.safetensors"):
        stored = file.read_bytes()
        total += len(stored) - int.from_bytes(stored[:8], "little") - 8
    return total


@pytest.mark.parametrize(
    ("compose", "stages"),
    [
        ({}, [*EXPERTS, "shared", "route", "composite", "evaluate"]),
        ({"kind": "routed"}, [*EXPERTS, "shared", "route", "composite", "evaluate"]),
        ({"kind": "merge"}, ["weight", "dense-merge", "merged", "composite", "evaluate"]),
        (
            {"kind": "merge", "parameters": {"weight": 0.3}, "sparse": "none"},
            ["dense-merge", "merged", "composite", "evaluate"],
        ),
        ({"kind": "ensemble"}, [*EXPERTS, "composite", "evaluate"]),
    ],
)
def test_every_kind_has_its_stages(
    world: Any, tmp_path: Path, compose: dict[str, Any], stages: list[str]
) -> None:
    found = planned(world, tmp_path, compose=compose)
    assert [stage.name for stage in found.stages] == stages
    assert not any(stage.done for stage in found.stages)
    assert all(stage.read_bytes > 0 and stage.seconds >= 0 for stage in found.stages)
    assert found.seconds > 0 and found.peak_bytes > 0
    assert not (tmp_path / "work").exists()
    rows = found.rows()
    assert len(rows) == len(stages) + 1 and {len(row) for row in rows} == {len(COLUMNS)}
    assert json.loads(json.dumps(found.to_dict()))["kind"] == found.kind


def test_bytes_follow_from_pattern_and_values(world: Any, tmp_path: Path) -> None:
    """A matrix of 32 by 48 in fp32: 2:4 keeps half in 2 bytes each and a bit for every weight."""
    ffn, layers, count = 32 * 48 * 3, 2, 3
    rest = planned(world, tmp_path).dense_bytes // count - 4 * ffn * layers
    gates = 4 * layers * count * 32
    for prune, bits in (({}, 9), ({"values": "int4"}, 3), ({"pattern": "4:8"}, 9)):
        found = planned(world, tmp_path, prune=prune)
        scales = 2 * (48 + 48 + 32) * layers * count if prune.get("values") else 0
        packed = ffn * layers * bits // 8
        assert found.composite_bytes == rest + count * packed + gates + scales


@pytest.mark.parametrize(
    "compose",
    [
        {"shared": "base"},
        {"shared": "base", "layers": [1]},
        {"kind": "routed", "shared": "base"},
        {"kind": "routed", "base": "none", "shared": "base"},
        {"kind": "merge"},
        {"kind": "merge", "parameters": {"weight": 0.3}, "sparse": "shared_mask"},
        {"kind": "merge", "parameters": {"weight": 0.3}, "sparse": "conflict_aware"},
        {"kind": "ensemble"},
    ],
    ids=str,
)
def test_a_build_does_what_was_planned(world: Any, tmp_path: Path, compose: dict[str, Any]) -> None:
    prune = {"method": "magnitude", "refit_steps": 0}
    values = world.recipe(compose=compose, prune=prune, route={"train_steps": 0})
    recipe, out = Recipe.model_validate(values), tmp_path / "out"
    before = plan(recipe, default_work(out))
    build(recipe, out)
    after = plan(recipe, default_work(out))
    made = {stage.name for stage in after.stages if stage.done}
    assert made == {stage.name for stage in before.stages} - {"composite", "evaluate"}
    ran = {read_json(file)["name"] for file in default_work(out).glob("*/stage.json")}
    assert ran == made
    [written] = [stage.written_bytes for stage in before.stages if stage.name == "composite"]
    assert abs(weights_of(out) - written) <= 0.1 * written
    other = recipe.model_copy(update={"seed": 1})
    assert {s.name for s in plan(other, default_work(out)).stages if s.done} <= made
