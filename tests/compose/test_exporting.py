"""One expert of a routed model as a stock dense checkpoint: equal to the one-hot route."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moiety.compose import Recipe, build
from moiety.compose.exporting import export_expert
from moiety.errors import InputError, OutputError
from moiety.experts.unpack import dense_view
from moiety.files import read_json
from moiety.routers import find_gates, forced, one_hot

PARTS = ("norms", "embeddings", "head")
IDS = torch.arange(3, 43).reshape(2, 20)
KINDS: dict[str, dict[str, Any]] = {
    "deltas and norms": {"shared": "base", "norms": "routed"},
    "no base": {"shared": "base", "base": "none"},
    "split": {"shared": "soup", "routers": "split"},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module", params=[*KINDS, "int8", "0.5"])
def built(request: Any, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    compose = {"kind": "routed", **KINDS.get(request.param, {"shared": "base"})}
    prune: dict[str, Any] = {"method": "magnitude", "refit_steps": 0}
    prune |= {"int8": {"values": "int8"}, "0.5": {"pattern": "0.5"}}.get(request.param, {})
    changes = {"compose": compose, "prune": prune, "route": {"train_steps": 0}}
    build(world.write_recipe(folder / "recipe.yaml", **changes), folder / "out", check=False)
    return folder / "out"


def test_an_exported_expert_is_the_one_hot_route(built: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built)
    found = []
    for index, name in enumerate(("letters", "numbers", "colours")):
        out = export_expert(built, name, tmp_path / name)
        stock = AutoModelForCausalLM.from_pretrained(out)
        assert type(stock).__name__ == "LlamaForCausalLM"
        assert read_json(out / "config.json")["model_type"] == "llama"
        assert not {"quantization_config", "moiety", "auto_map"} & set(
            read_json(out / "config.json")
        )
        with forced(find_gates(model), one_hot(index)):
            found.append(logits(model))
        torch.testing.assert_close(logits(stock), found[-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_biases_embeddings_and_a_head_of_its_own_go_along(world: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(world.base)
    settings = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    config = type(base.config)(**{**base.config.to_dict(), **settings})
    model = AutoModelForCausalLM.from_config(config)
    values = world.recipe(
        compose={"kind": "routed", "shared": "base", **dict.fromkeys(PARTS, "routed")},
        prune={"method": "magnitude", "refit_steps": 0},
        route={"train_steps": 0},
    )
    values["base"] = str(tmp_path / "base")
    for place in (values, *values["experts"]):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        folder = tmp_path / place.get("name", "base")
        model.save_pretrained(folder)
        world.tokenizer.save_pretrained(folder)
        if "name" in place:
            place["model"] = str(folder)
    build(Recipe.model_validate(values), tmp_path / "out", check=False)
    composite = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(
        export_expert(tmp_path / "out", "numbers", tmp_path / "dense")
    )
    with forced(find_gates(composite), one_hot(1)):
        torch.testing.assert_close(logits(stock), logits(composite), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_named(built: Path, world: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="letters, numbers, colours, but it is law"):
        export_expert(built, "law", tmp_path / "law")
    with pytest.raises(InputError, match="expected a routed model"):
        export_expert(world.base, "letters", tmp_path / "base")
    with pytest.raises(InputError, match="of kind moiety_routed"):
        dense_view(built)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("1")
    with pytest.raises(OutputError, match="absent or empty"):
        export_expert(built, "letters", tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}
