"""Model cards: metadata the hub takes, what is told, and text that cannot do harm."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moiety.compose import Recipe
from moiety.compose.building import build
from moiety.compose.card import write_card
from moiety.compose.card.licences import Licence, licence_of, shared_licence
from moiety.compose.card.markdown import fenced, plain, table
from moiety.compose.card.sizes import sizes_of
from moiety.compose.report import BuildReport
from moiety.compose.shim import write_shim
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.write import stored_bytes

RESULTS = {
    "context_length": 32,
    "seed": 7,
    "domains": ["letters", "numbers"],
    "loss": {
        "base": {"letters": 3.14159, "numbers": 2.5},
        "expert": {"letters": 1.5},
        "composite": {"letters": 1.25, "numbers": 1.75},
    },
    "bits_per_byte": {"composite": {"letters": 0.5, "numbers": 0.625}},
    "accuracy": {"sums|": {"base": 0.25, "own_expert": 0.5}},
    "tokens_per_second": {"composite": {"prefill": 1000.4, "decode": 12.34}},
    "device": "CPU <b>",
}
INVARIANTS = [
    {"statement": "routes | <b>hold</b>", "difference": 2e-7, "allowed": 1e-3, "holds": True}
]


@pytest.fixture(scope="module")
def built(world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, BuildReport]:
    folder = tmp_path_factory.mktemp("card")
    recipe = Recipe.read(world.write_recipe(folder / "recipe.yaml"))
    return recipe, build(recipe, folder / "composite")


def card_of(built: tuple[Recipe, BuildReport], folder: Path, **told: Any) -> ModelCard:
    """The card of a copy of the composite in `folder`, with a shim."""
    recipe, report = built
    shutil.copytree(report.composite, folder)
    write_shim(folder, type(AutoConfig.from_pretrained(folder)))
    write_card(folder, recipe, report, **told)
    return ModelCard.load(folder / "README.md")


def with_licence(world: Any, folder: Path, licences: dict[str, str]) -> dict[str, Any]:
    """Recipe values whose models are copies that state these front matters."""
    values = world.recipe()
    models = {"base": world.base, **world.finetunes}
    for name, front in licences.items():
        copy = folder / name
        shutil.copytree(models[name], copy)
        (copy / "README.md").write_text(f"---\n{front}\n---\n# a model\n")
    values["base"] = str(folder / "base")
    for expert in values["experts"]:
        expert["model"] = str(folder / expert["name"])
    return values


def test_metadata_and_sections(built: tuple[Recipe, BuildReport], tmp_path: Path) -> None:
    card = card_of(built, tmp_path / "c", results=RESULTS, invariants=INVARIANTS)
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"moiety", "merge", "moe"} <= set(metadata["tags"])
    assert metadata.keys().isdisjoint({"license", "base_model", "datasets"})
    headings = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Loading",
        "## Bytes",
        "## Measured",
        "## Invariants",
        "## Licence",
        "## Recipe",
        "## Limits",
    ]
    assert "context length 32 tokens, seed 7" in card.text
    assert "| base | 3.142 | 2.500 |" in card.text
    assert "| expert | 1.500 | \N{EN DASH} |" in card.text
    assert "| composite | 0.500 | 0.625 |" in card.text
    assert r"| share | sums\| |" in card.text and "| own expert | 0.500 |" in card.text
    assert "--out NEW --dense`" in card.text and "--expert" not in card.text
    assert "| composite | 1000 | 12.3 |" in card.text and "CPU &lt;b&gt;" in card.text
    assert r"| routes \| &lt;b&gt;hold&lt;/b&gt; | 2e-07 | 0.001 | yes |" in card.text
    assert "trust_remote_code=True" in card.text and "import moiety\n" in card.text
    assert str(built[1].composite.parent) not in card.content


def test_written_again_with_results_it_takes_the_old_ones_place(
    built: tuple[Recipe, BuildReport], tmp_path: Path
) -> None:
    recipe, report = built
    before = card_of(built, tmp_path / "c")
    assert "Not measured" in before.text and "## Invariants" not in before.text
    write_card(tmp_path / "c", recipe, report, RESULTS)
    after = ModelCard.load(tmp_path / "c" / "README.md")
    assert "Not measured" not in after.text
    assert sorted(path.name for path in (tmp_path / "c").glob("*README*")) == ["README.md"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "c").config.model_type == "mixtral"


def test_bytes_are_those_of_the_files(
    built: tuple[Recipe, BuildReport], world: Any, tmp_path: Path
) -> None:
    card = card_of(built, tmp_path / "c")
    total = stored_bytes(Checkpoint(tmp_path / "c"))
    matrices = 2 * 3 * 32 * 48
    packed = 3 * matrices * 9 // 8
    dense = total - packed + 3 * matrices * 2
    active = total - packed // 3
    for told, size in (("all weights", total), ("active for one token", active)):
        assert f"| {told} | {size:,} |" in card.text
    assert f"| all weights, were they dense | {dense:,} |" in card.text


@pytest.mark.parametrize("base", ["dense", "none"])
def test_a_routed_models_dense_twin_has_whole_experts(
    base: str, world: Any, tmp_path: Path
) -> None:
    shapes = {"model.q_proj.experts": (3, 4, 8), "model.norm.weight": (16,)}
    shapes |= {"model.q_proj.weight": (4, 16)} if base == "dense" else {}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    tensors["model.q_proj.experts_mask"] = torch.zeros(3, 4, 2, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    compose = {"kind": "routed", "base": base, "top_k": 1}
    sizes = sizes_of(tmp_path, Recipe.model_validate(world.recipe(compose=compose)))
    own, experts = 2 * 16 + (2 * 64 if base == "dense" else 0), 3 * 4 * (8 * 2 + 2)
    assert (sizes.total, sizes.active) == (own + experts, own + experts // 3)
    assert sizes.dense == 2 * 16 + 2 * 3 * 4 * 16


def test_a_task_vector_says_that_its_base_is_not_counted(
    built: tuple[Recipe, BuildReport], tmp_path: Path
) -> None:
    recipe, report = built
    shutil.copytree(report.composite, tmp_path / "c")
    file = tmp_path / "c" / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "moiety": {"task_vector_of": "/secret/base"}}))
    write_card(tmp_path / "c", recipe, report)
    card = ModelCard.load(tmp_path / "c" / "README.md")
    assert "is not counted" in card.text and "open_delta(" in card.text
    assert "/secret" not in card.content


def test_hub_ids_become_base_models(built: tuple[Recipe, BuildReport], tmp_path: Path) -> None:
    recipe, report = built
    experts = [recipe.experts[0].model_copy(update={"model": "some/finetune"}), *recipe.experts[1:]]
    changed = recipe.model_copy(update={"base": "some/base-7b", "experts": experts})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        metadata = card_of((changed, report), tmp_path / "c").data.to_dict()
    assert metadata["base_model"] == ["some/base-7b", "some/finetune"]
    assert metadata["base_model_relation"] == "merge"


def test_a_licence_that_all_inputs_state_is_carried_over(
    built: tuple[Recipe, BuildReport], world: Any, tmp_path: Path
) -> None:
    names = ["base", *world.finetunes]
    values = with_licence(world, tmp_path, dict.fromkeys(names, "license: apache-2.0"))
    recipe = Recipe.model_validate(values)
    card = card_of((recipe, built[1]), tmp_path / "c")
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert "All of its inputs state apache-2.0." in card.text


def test_different_licences_are_told_and_none_is_given(
    built: tuple[Recipe, BuildReport], world: Any, tmp_path: Path
) -> None:
    names = ["base", *world.finetunes]
    stated = dict.fromkeys(names, "license: mit")
    stated["numbers"] = "license: other\nlicense_name: '[x](http://evil) <script>|'"
    recipe = Recipe.model_validate(with_licence(world, tmp_path, stated))
    card = card_of((recipe, built[1]), tmp_path / "c")
    assert "license" not in card.data.to_dict()
    assert "Its inputs state different licences." in card.text
    assert "| letters | mit |" in card.text
    assert r"other \(\[x\]\(http&#58;//evil\) &lt;script&gt;\|\)" in card.text


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit", Licence("mit")),
        ("license: other\nlicense_name: house", Licence("other", "house")),
        ("license: [mit, gpl-3.0]", None),
        ("license: !!python/object/apply:os.system [true]", None),
        ("license: {", None),
        ("tags: [x]", None),
    ],
)
def test_what_a_readme_states(front: str, licence: Licence | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\nText.\n")
    assert licence_of(str(tmp_path)) == licence


def test_a_configuration_may_state_it_too(tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps({"license": "bsd-3-clause"}))
    assert licence_of(str(tmp_path)) == Licence("bsd-3-clause")
    (tmp_path / "config.json").write_text("[")
    assert licence_of(str(tmp_path)) is None


def test_only_equal_usable_licences_are_shared() -> None:
    mit, other = Licence("mit"), Licence("other", "house")
    assert shared_licence({"a": mit, "b": mit}) == mit
    assert shared_licence({"a": other, "b": other}) == other
    assert shared_licence({"a": mit, "b": other}) is None
    assert shared_licence({"a": mit, "b": None}) is None
    assert shared_licence({"a": None, "b": None}) is None
    assert (
        shared_licence({"a": Licence("my licence\n---"), "b": Licence("my licence\n---")}) is None
    )


def test_text_is_shown_literally_and_cannot_leave_its_place() -> None:
    assert plain("a\nb\u202ec") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    assert plain("<img src=x>&") == "&lt;img src=x&gt;&amp;"
    assert plain("www.x.org") == "www&#46;x.org"
    assert table(("a", "b"), [("x|y", "1.5")]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1.5 |"
    assert fenced("a\n````\nb", "yaml") == "`````yaml\na\n````\nb\n`````"
