"""Recipes: what is read, and how a mistake is explained."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from moiety.compose import Recipe
from moiety.compose.recipe import Ensemble, Mixture
from moiety.errors import InputError

GOOD = """\
base: base
experts:
  - name: code
    model: code
    domain: code.jsonl
  - name: law
    model: law
    domain:
      calibration: law.jsonl
      heldout: law.heldout.jsonl
prune:
  pattern: 2:4
compose:
  kind: mixture
  top_k: 1
"""


def read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return Recipe.read(path)


def test_a_recipe_reads_and_writes_itself(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    recipe = read(tmp_path, GOOD)
    assert recipe.base == str((tmp_path / "base").resolve())
    assert recipe.experts[0].model == "code"
    assert recipe.experts[0].domain.calibration == "code.jsonl"
    assert recipe.compose == Mixture(top_k=1)
    assert read(tmp_path, recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("prune:", "prunes:", r"line 11: unknown field prunes; did you mean prune\?"),
        ("top_k: 1", "topk: 1", r"line 15: unknown field compose\.topk; did you mean top_k\?"),
        ("calibration:", "calibrate:", r"unknown field experts\.1\.domain\.calibrate; did you"),
        ("top_k: 1", "top_k: 0", r"line 15: compose\.top_k: .*greater than or equal to 1.* 0"),
        ("top_k: 1", "top_k: 3", r"line 15: compose\.top_k must be at most the number of"),
        ("name: law", "name: code", "every name must be used once, but code is twice"),
        ("kind: mixture", "kind: soup", r"line 14: compose\.kind: .*'mixture'.*'soup'"),
        ("base: base\n", "", "base: Field required"),
        ("2:4", "4:2", r"line 12: prune\.pattern: pattern must keep .* fewer than all"),
        ("2:4", "7", r"line 12: prune\.pattern: .*string"),
        ("2:4", "1.5", r"line 12: prune\.pattern: pattern must look like"),
        ("2:4", "2:4\n  values: int2", r"line 13: prune\.values: .*'int4'.*'int2'"),
        ("model: law", "model: [1]", r"line 7: experts\.1\.model: .*string"),
        ("name: law", "name: ../law", r"line 6: experts\.1\.name: .*pattern"),
        ("experts:", "experts: [", "expected YAML"),
        ("pattern: 2:4", "method: sparsegp", r"prune\.method: .*did you mean sparsegpt\?"),
        ("kind: mixture", "kind: mixtur", r"compose\.kind: .*did you mean mixture\?"),
        ("top_k: 1", "shared: {methods: ties}", r"compose\.shared\.methods; did you mean method\?"),
        ("model: law", "model: law\n    model: law2", r"the same field twice: line 8: model"),
        ("      heldout", "      prompts: [a]\n      heldout", "calibration or prompts, but both"),
        ("kind: mixture\n  top_k: 1", "kind: ensemble\n  prior: {cod: 1}", "it has 'cod'"),
        ("kind: mixture\n  top_k: 1", "kind: ensemble\n  prior: {law: 1}", "line 15: .*code has n"),
        ("model: law", "model: law\n    prune: {values: int8}", r"law: prune\.values must be the"),
        ("base: base", "base: base\ndtype: bfloat8", r"line 2: dtype: .*did you mean bfloat16\?"),
    ],
)
def test_a_mistake_names_its_line_and_field(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, GOOD.replace(old, new, 1))


def test_a_kind_may_stand_alone(tmp_path: Path) -> None:
    text = GOOD.replace("compose:\n  kind: mixture\n  top_k: 1\n", "compose: ensemble\n")
    assert read(tmp_path, text).compose == Ensemble()


@pytest.mark.parametrize(("text", "pattern"), [("0.5", "0.5"), ("50%", "50%"), ("4:8", "4:8")])
def test_every_pattern_can_be_written_plainly(tmp_path: Path, text: str, pattern: str) -> None:
    recipe = read(tmp_path, GOOD.replace("2:4", f"{text}\n  values: int8"))
    assert (recipe.prune.pattern, recipe.prune.values) == (pattern, "int8")
    assert read(tmp_path, recipe.to_yaml()) == recipe


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_something_else_than_a_recipe(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="expected fields such as base and experts"):
        read(tmp_path, text)


def test_an_absent_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a recipe at .*nowhere\.yaml"):
        Recipe.read(tmp_path / "nowhere.yaml")


def test_yaml_cannot_execute(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected YAML"):
        read(tmp_path, "base: !!python/object/apply:os.system ['true']\n")


def test_python_objects_say_the_same(world: Any) -> None:
    values = world.recipe()
    recipe = Recipe.model_validate(values)
    assert recipe.names == list(world.finetunes)
    assert yaml.safe_load(recipe.to_yaml())["route"]["train_steps"] == 4


def test_a_domain_may_be_absent_or_written_here(tmp_path: Path) -> None:
    text = GOOD.replace("    domain: code.jsonl\n", "").replace(
        "calibration: law.jsonl", "prompts: [whereas, ' ']"
    )
    recipe = read(tmp_path, text)
    assert [expert.domain.has_text for expert in recipe.experts] == [False, True]
    assert recipe.experts[1].domain.documents() == ["whereas"]
    with pytest.raises(InputError, match=r"none is named; give domain\.calibration"):
        recipe.experts[0].domain.documents()
    assert read(tmp_path, recipe.to_yaml()) == recipe


def test_only_a_dense_merge_of_given_weights_needs_no_text(tmp_path: Path) -> None:
    for compose, needed in (
        ("kind: mixture", True),
        ("kind: merge", True),
        ("kind: merge\n  sparse: none", True),
        ("kind: merge\n  sparse: none\n  parameters: {weight: 0.3}", False),
    ):
        recipe = read(tmp_path, GOOD.replace("kind: mixture\n  top_k: 1", compose))
        assert recipe.needs_text is needed
