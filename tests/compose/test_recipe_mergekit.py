"""mergekit's own files as recipes: what is carried over, what is refused and where."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit.config import MergeConfiguration
from mergekit.moe.config import MoEMergeConfig

from moiety.compose import Recipe
from moiety.compose.recipe import Merge, Mixture
from moiety.errors import InputError

TIES = """\
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - model: org/code
    parameters:
      density: 0.5
      weight: 0.3
  - model: org/base+org/law-lora
    parameters:
      weight: 0.7
parameters:
  density: 0.9
  normalize: true
  int8_mask: true
dtype: bfloat16
tokenizer_source: base
"""
LINEAR = """\
merge_method: linear
models:
  - model: org/code
    parameters: {weight: 1}
  - model: org/law
    parameters: {weight: 2}
"""
SLERP = """\
merge_method: slerp
base_model: org/code
models: [{model: org/law}, {model: org/code}]
parameters: {t: 0.4}
"""
MOE = """\
base_model: org/base
gate_mode: hidden
experts_per_token: 1
dtype: float32
experts:
  - source_model: org/code
    positive_prompts:
      - write a function
      - fix this bug
  - source_model: org/law
    positive_prompts: [read this contract]
"""


def read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "mergekit.yaml"
    path.write_text(text)
    return Recipe.read(path)


@pytest.mark.parametrize("text", [TIES, LINEAR, SLERP])
def test_mergekit_reads_these_too(text: str) -> None:
    assert MergeConfiguration.model_validate(yaml.safe_load(text)).merge_method


def test_mergekit_moe_reads_that_too() -> None:
    assert len(MoEMergeConfig.model_validate(yaml.safe_load(MOE)).experts) == 2


def test_a_merge_of_task_vectors(tmp_path: Path) -> None:
    recipe = read(tmp_path, TIES)
    assert recipe.base == "org/base" and recipe.dtype == "bfloat16"
    assert {e.name: e.model for e in recipe.experts} == {
        "code": "org/code",
        "law-lora": "org/law-lora",
    }
    parameters = {
        "density": {"code": 0.5, "law-lora": 0.9},
        "weight": {"code": 0.3, "law-lora": 0.7},
        "normalize": True,
        "int8_mask": True,
    }
    assert recipe.compose == Merge(method="ties", parameters=parameters, sparse="none")
    assert not recipe.needs_text
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / "again.yaml") == recipe


def test_an_average_takes_its_first_model_for_the_rest(tmp_path: Path) -> None:
    recipe = read(tmp_path, LINEAR)
    assert (recipe.base, recipe.names) == ("org/code", ["code", "law"])
    weights: dict[str, Any] = {"weight": {"code": 1, "law": 2}}
    assert recipe.compose == Merge(method="linear", parameters=weights, sparse="none")


def test_slerp_goes_from_its_base(tmp_path: Path) -> None:
    recipe = read(tmp_path, SLERP)
    assert (recipe.base, recipe.names) == ("org/code", ["code", "law"])


def test_a_moe(tmp_path: Path) -> None:
    recipe = read(tmp_path, MOE)
    assert recipe.compose == Mixture(top_k=1, shared="base")
    assert (recipe.base, recipe.dtype) == ("org/base", "float32")
    assert (recipe.route.init, recipe.route.train_steps) == ("centroid", 0)
    assert recipe.experts[0].domain.documents() == ["write a function", "fix this bug"]
    other = recipe.with_data({"law": "law.jsonl"})
    assert other.experts[1].domain.calibration == "law.jsonl"
    assert other.experts[1].domain.prompts == () and other.experts[0] == recipe.experts[0]
    with pytest.raises(InputError, match="code, law, but poems is none"):
        recipe.with_data({"poems": "x"})


def test_random_gates_need_no_prompts(tmp_path: Path) -> None:
    text = "base_model: b\ngate_mode: random\nexperts: [{source_model: x}, {source_model: y}]\n"
    recipe = read(tmp_path, text)
    assert recipe.route.init == "random" and recipe.compose == Mixture(shared="base")
    assert not recipe.experts[0].domain.has_text


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (TIES, "models:", "slices:", r"line 3: slices: layers of several models"),
        (TIES, "density: 0.9", "density: [0.1, 0.9]", r"line 13: parameters\.density: .*one numb"),
        (
            TIES,
            "weight: 0.3",
            "weight: [{filter: mlp, value: 1}]",
            r"line 8: models\.1\.parameters\.weight: a parameter must be one",
        ),
        (TIES, "source: base", "source: org/code", "line 17: tokenizer_source: a model's own"),
        (TIES, "source: base", "source: base\nchat_template: auto", r"line 18: chat_template"),
        (TIES, "dtype: bf", "out_dtype: float32\ndtype: bf", "line 16: out_dtype: nothing"),
        (TIES, "org/base+", "org/other+", r"line 9: models\.2\.model: an adapter must be one of"),
        (TIES, "org/code", "org/code@main", r"line 5: models\.1\.model: revisions"),
        (TIES, "base_model: org/base\n", "", "line 1: merge_method: .*give one"),
        (
            TIES,
            "- model: org/base\n",
            "- model: org/base\n    parameters: {weight: 1}\n",
            r"line 5: models\.0\.parameters: those of the base",
        ),
        (LINEAR, "models:", "base_model: org/code\nmodels:", "line 2: base_model: .*averages"),
        (LINEAR, "parameters: {weight: 2}", "", r"line 5: models\.1: weight is given for other"),
        (LINEAR, "models:", "surprise: 1\nmodels:", "line 2: surprise: it has no equal"),
        (LINEAR, "linear", "magic", "compose.method: expected one of mergekit's methods"),
        (MOE, "hidden", "cheap_embed", "line 2: gate_mode: .*write gate_mode: hidden"),
        (MOE, "hidden", "uniform_random", "line 2: gate_mode: .*write gate_mode: random"),
        (MOE, "    positive", "    negative_prompts: [x]\n    positive", "negative_prompts: a g"),
        (MOE, "    positive", "    noise_scale: 1\n    positive", r"experts\.0\.noise_scale"),
        (MOE, "experts:", "shared_experts: []\nexperts:", "line 5: shared_experts: a mixture"),
        (MOE, "experts:", "architecture: qwen\nexperts:", "line 5: architecture: the stock"),
        (MOE, "experts_per_token: 1", "experts_per_token: 3", "top_k must be at most"),
    ],
)
def test_what_cannot_be_carried_over_is_named(
    tmp_path: Path, text: str, old: str, new: str, message: str
) -> None:
    assert old in text
    with pytest.raises(InputError, match=message):
        read(tmp_path, text.replace(old, new, 1))


def test_everything_refused_is_in_one_message(tmp_path: Path) -> None:
    text = TIES.replace("dtype: bfloat16", "chat_template: auto\nmodules: {}")
    with pytest.raises(InputError, match=r"line 16: chat_template.*line 17: modules"):
        read(tmp_path, text)
