"""Measurements against plain ones: losses, exact answers, controls, bytes."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from moiety.analysis import evaluate
from moiety.analysis.controls import evaluate_build
from moiety.analysis.evaluate import (
    Problem,
    continue_greedily,
    exact_match,
    model_bytes,
    read_problems,
)
from moiety.compose import Recipe, build, open_composite
from moiety.errors import InputError
from moiety.experts.delta import DeltaLinear
from moiety.experts.modules import SparseExperts
from moiety.experts.pattern import Pattern
from moiety.scoring import score
from moiety.text import read_documents, token_windows
from tests.experts import packs


@pytest.fixture(scope="module")
def built(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    build(world.write_recipe(folder / "recipe.yaml"), folder / "composite")
    return folder / "composite"


def test_score_is_the_plain_mean_over_tokens(world: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(world.base)
    texts = read_documents(world.texts["letters"]["heldout"])[:5]
    windows = token_windows(world.tokenizer, texts, 24)
    nats, tokens = 0.0, 0
    for ids, mask in zip(windows.ids_WC, windows.mask_WC, strict=True):
        row = ids[mask.bool()][None]
        with torch.no_grad():
            logits = model(row).logits
        nats += float(cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum"))
        tokens += row.shape[1] - 1
    for batch_size in (1, 3, 50):
        found = score(model, windows, batch_size)
        assert found.tokens == tokens
        assert found.nats == pytest.approx(nats, rel=1e-5)
        assert found.loss == pytest.approx(nats / tokens, rel=1e-5)
        per_byte = nats / math.log(2) / int(windows.bytes_W.sum())
        assert found.bits_per_byte == pytest.approx(per_byte, rel=1e-5)


def test_evaluate_has_the_router_controls(world: Any, built: Path) -> None:
    data = {name: texts["heldout"] for name, texts in world.texts.items()}
    results = evaluate(built, data, context_length=32, windows=6)
    rows = {"composite", "uniform", "random", "sequence_level", "oracle"}
    assert results["loss"].keys() == rows == results["bits_per_byte"].keys()
    assert len({tuple(row.values()) for row in results["loss"].values()}) == len(rows)
    with pytest.raises(InputError, match="domains named like the experts"):
        evaluate(built, {"poetry": data["letters"]}, context_length=32)


def test_controls_of_a_build(world: Any, built: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "alpha beta", "answer": " gamma"}\n' * 3)
    evaluation = {"windows": 6, "problems": {"letters": str(problems)}}
    recipe = Recipe.model_validate(world.recipe(evaluate=evaluation))
    work = built.with_name("composite.stages")
    results = evaluate_build(recipe, built, work)
    assert results["loss"].keys() >= {"base", "soup", "task_arithmetic", "finetune", "expert"}
    assert list(results["loss"]["finetune"]) == list(world.finetunes)
    answered = results["accuracy"]["letters"].keys()
    assert answered >= {"base", "finetune", "expert", "composite", "oracle"}
    own = LlamaForCausalLM.from_pretrained(world.finetunes["numbers"])
    texts = read_documents(world.texts["numbers"]["heldout"])
    alone = score(own, token_windows(world.tokenizer, texts, 32, 6)).loss
    assert results["loss"]["finetune"]["numbers"] == pytest.approx(alone, rel=1e-6)
    assert evaluate_build(recipe, built, work) == results


def test_controls_need_held_out_text(world: Any, built: Path, tmp_path: Path) -> None:
    values = world.recipe()
    del values["experts"][1]["domain"]["heldout"]
    with pytest.raises(InputError, match="held-out text for expert numbers"):
        evaluate_build(Recipe.model_validate(values), built, tmp_path)


def test_bytes_count_packed_experts_and_their_dense_twins(built: Path) -> None:
    model = open_composite(built).model
    tiled = model_bytes(model)
    for module in model.modules():
        if isinstance(module, SparseExperts):
            module.untile()
    sizes = model_bytes(model)
    assert sizes == tiled
    weights = 2 * 3 * 3 * 32 * 48
    assert sizes["experts_dense"] == 2 * weights
    assert sizes["experts_packed"] == 2 * weights * 9 // 16
    assert sizes["composite"] == sum(p.nbytes for p in model.parameters())
    difference = sizes["dense_composite"] - sizes["composite"]
    assert difference == sizes["experts_dense"] - sizes["experts_packed"]


def test_bytes_of_differences_are_those_that_are_stored() -> None:
    _, delta = packs.packed(128, 512, "2:4", "bf16")
    base = torch.nn.Linear(512, 128, bias=False, dtype=torch.bfloat16)
    module = DeltaLinear(base, delta, Pattern.parse("2:4"), "bf16")
    stored = model_bytes(module)
    assert stored["experts_packed"] == 2 * 128 * 512 * 9 // 16
    assert stored["composite"] == stored["experts_packed"] + base.weight.nbytes
    module.prepare()
    assert model_bytes(module) == stored


def test_left_padding_does_not_change_what_is_written(world: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(world.base)
    prompts = ["alpha beta", "one two three four", "x"]
    texts = continue_greedily(model, world.tokenizer, prompts, 6)
    for prompt, text in zip(prompts, texts, strict=True):
        assert [text] == continue_greedily(model, world.tokenizer, [prompt], 6)


def test_exact_match_compares_up_to_the_end_of_the_line(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {"right": " 42\n7 + 1", "longer": " 420", "other": " 7", "spaces": "  42 \n"}
    monkeypatch.setattr(
        importlib.import_module("moiety.analysis.evaluate"),
        "continue_greedily",
        lambda _model, _tokenizer, prompts, _tokens: [written[prompt] for prompt in prompts],
    )
    problems = [Problem(prompt, " 42") for prompt in written]
    model: Any = None
    assert exact_match(model, world.tokenizer, problems, batch_size=3) == 2 / 4


@pytest.mark.parametrize("line", ["", "{", '{"prompt": "x"}', "[1]"])
def test_problems_that_are_none(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(InputError, match="expected"):
        read_problems(tmp_path / "p.jsonl")
