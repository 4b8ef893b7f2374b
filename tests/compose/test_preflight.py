"""What is refused before any work, what is only noted, and that each says what to do."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from moiety.compose import Recipe, build
from moiety.compose.plan import plan
from moiety.compose.preflight import Preflight, examine, preflight
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.text import read_documents, write_documents

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
Change = Callable[[Path], None]


def looked(world: Any, **changes: Any) -> Preflight:
    return examine(Recipe.model_validate(world.recipe(**changes)))


def with_model(world: Any, model: Path | str, **changes: Any) -> Preflight:
    """The world's recipe with another model for its second expert."""
    values = world.recipe(**changes)
    values["experts"][1]["model"] = str(model)
    return examine(Recipe.model_validate(values))


def copy(world: Any, folder: Path, name: str = "numbers") -> Path:
    return Path(shutil.copytree(world.finetunes[name], folder))


def edit(file: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_a_good_recipe_has_nothing_to_say(world: Any) -> None:
    assert looked(world) == Preflight((), ())
    assert preflight(Recipe.model_validate(world.recipe())) == ()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rms_norm_eps", 1e-3, "another base: rms_norm_eps is 0.001 where the base has 1e-06"),
        ("num_attention_heads", 2, "num_attention_heads is 2 .*give finetunes of one base"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 500.0},
            "rope_parameters is .*500.*restore it there",
        ),
        ("tie_word_embeddings", False, "tie_word_embeddings is False .*save the tied one again"),
        ("vocab_size", 400, "vocab_size is 400 where the base has .*tokenizer: union"),
    ],
)
def test_configurations_that_differ(
    world: Any, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    model = copy(world, tmp_path / "other")
    edit(model / "config.json", lambda config: config.update({field: value}))
    found = with_model(world, model)
    [problem] = found.problems
    assert re.search(f"expert numbers.*{message}", problem)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("model", lambda m: m["merges"].reverse(), "merges otherwise"),
        ("normalizer", None, r"normalises text otherwise than the base's \(normalizer\)"),
        ("pre_tokenizer", None, r"splits text into words otherwise"),
        ("added_tokens", lambda t: t[0].update(lstrip=True), "added tokens differ .*<bos>"),
    ],
)
def test_tokenizers_of_one_vocabulary_that_read_otherwise(
    world: Any, tmp_path: Path, part: str, change: Any, message: str
) -> None:
    model = copy(world, tmp_path / "other")
    replaced = {
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
    }

    def changed(tokenizer: Any) -> None:
        if change is None:
            tokenizer[part] = replaced[part]
        else:
            change(tokenizer[part])

    edit(model / "tokenizer.json", changed)
    [problem] = with_model(world, model).problems
    assert re.search(f"expert numbers: its tokenizer.*{message}", problem)
    assert "copy the base's tokenizer files" in problem


def test_special_tokens_and_vocabularies(world: Any, tmp_path: Path) -> None:
    model = copy(world, tmp_path / "special")
    edit(model / "tokenizer_config.json", lambda config: config.update(eos_token="<bos>"))
    [problem] = with_model(world, model).problems
    assert "other special tokens than the base's (eos_token: '<bos>' where" in problem
    larger = copy(world, tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(larger)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(larger)
    [problem] = with_model(world, larger).problems
    assert "another vocabulary than the base's (0 tokens fewer, 1 more, 0 with another" in problem


def test_vocabularies_that_differ_are_united(world: Any, tmp_path: Path) -> None:
    """As the refusal says, mergekit gives every model the tokens of all."""
    larger = copy(world, tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(larger)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(larger)
    model = LlamaForCausalLM.from_pretrained(larger)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(larger)
    merge = {"kind": "merge", "sparse": "none", "method": "linear", "parameters": {"weight": 1}}
    values = world.recipe(compose=merge)
    values["experts"][1]["model"] = str(larger)
    [problem] = examine(Recipe.model_validate(values)).problems[:1]
    assert "write tokenizer: union in the recipe" in problem
    recipe = Recipe.model_validate({**values, "tokenizer": "union"})
    found = examine(recipe)
    assert found.problems == ()
    assert any(
        "numbers has another vocabulary than the base (0 tok" in told for told in found.notes
    )
    assert "union" in {stage.name for stage in plan(recipe, tmp_path / "out.stages").left}
    build(recipe, tmp_path / "out", check=False)
    assert "union" not in {stage.name for stage in plan(recipe, tmp_path / "out.stages").left}
    made = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert made.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 385
    up = "model.layers.0.mlp.up_proj.weight"
    models = (*(world.finetunes[name] for name in ("letters", "colours")), larger)
    torch.testing.assert_close(made.get_parameter(up), sum(Checkpoint(m)[up] for m in models) / 3)


def test_what_is_only_noted(world: Any, tmp_path: Path) -> None:
    half = LlamaForCausalLM.from_pretrained(world.finetunes["numbers"]).half()
    half.save_pretrained(tmp_path / "half")
    world.tokenizer.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "chat_template.jinja").write_text("{{ messages }}")
    edit(tmp_path / "half" / "generation_config.json", lambda config: config.update(top_k=7))
    found = with_model(world, tmp_path / "half")
    assert found.problems == ()
    text = "\n".join(found.notes)
    for part in ("in float16 where the base has float32", "top_k: 7 where", "chat template"):
        assert part in text
    assert len(found.notes) == 3


def test_equal_models_are_noted(world: Any, tmp_path: Path) -> None:
    note = "expert numbers is equal to the base; was the finetune meant?"
    assert note in with_model(world, world.base).notes
    same = copy(world, tmp_path / "same", "letters")
    assert "experts letters and numbers are equal; no" in " ".join(with_model(world, same).notes)


def test_the_base_itself(world: Any, tmp_path: Path) -> None:
    found = looked(world, base=str(tmp_path / "nowhere"))
    assert len(found.problems) == 1 and found.problems[0].startswith("base: expected a model")
    bare = shutil.copytree(world.base, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert "base: expected a tokenizer" in looked(world, base=str(bare)).problems[0]
    [problem] = looked(world, dtype="bfloat16").problems
    assert "expected weights in bfloat16" in problem and "they are in float32" in problem
    assert looked(world, dtype="float32").problems == ()


@pytest.mark.parametrize(
    ("compose", "prune", "message"),
    [
        ({"layers": [0, 2]}, {}, "compose.layers"),
        ({}, {"pattern": "2:5"}, "prune.pattern: pattern 2:5 needs a multiple of 5 input"),
        ({"kind": "routed", "head": "routed"}, {}, "compose.head: .*ties it"),
        ({"kind": "merge", "method": "slerp"}, {}, "slerp"),
        ({"kind": "merge", "parameters": {"wait": 1}}, {}, "no parameter wait"),
        ({"kind": "merge", "parameters": {"weight": {"letters": 1}}}, {}, "numbers"),
        ({"shared": {"method": "ties"}}, {}, "compose.shared: ties needs the parameter weight"),
        ({"kind": "ensemble"}, {"sites": "*.w9_proj"}, "prune.sites: expected linear layers"),
        ({"kind": "routed", "embeddings": "routed"}, {}, "compose.embeddings: .*ties it"),
    ],
    ids=str,
)
def test_what_one_kind_asks_for(
    world: Any, compose: dict[str, Any], prune: dict[str, Any], message: str
) -> None:
    found = looked(world, compose=compose, prune=prune)
    assert found.problems, message
    assert re.search(message, "\n".join(found.problems))


@pytest.mark.parametrize(
    ("route", "message"),
    [({"init": "arrow"}, "route.init"), ({"balance": "bias"}, "route.balance")],
)
def test_what_the_gates_cannot_learn(world: Any, route: dict[str, Any], message: str) -> None:
    router = {"kind": "sigmoid", "score": "absolute"}
    for compose, told in (({}, True), ({"kind": "routed", "router": router}, False)):
        found = looked(world, compose=compose, route=route)
        assert any(message in problem for problem in found.problems) == told


def test_a_base_of_another_architecture(world: Any, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=len(world.tokenizer), n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    world.tokenizer.save_pretrained(tmp_path / "gpt")
    problems = looked(world, base=str(tmp_path / "gpt")).problems
    assert "gpt2" in problems[0] and len(problems) >= 4
    assert sum("is a finetune of another base: model_type is 'llama'" in p for p in problems) == 3


def test_text_that_is_missing_or_short(world: Any, tmp_path: Path) -> None:
    values = world.recipe()
    values["experts"][0]["domain"] = {}
    values["experts"][1]["domain"] = {"prompts": ["one two three four five six seven eight nine"]}
    values["experts"][2]["domain"] = {"calibration": str(world.texts["colours"]["calibration"])}
    found = examine(Recipe.model_validate(values))
    missing, short = found.problems
    assert "expert letters, calibration text: expected calibration text, but none" in missing
    assert "expert numbers: its prompts are" in short and "--data numbers=FILE" in short
    assert "at least 128 (4 windows of context_length 32)" in short
    assert found.notes == (
        "no held-out text for letters, numbers, colours, so the result is not measured; "
        "give domain.heldout for every expert",
    )
    merge = {"kind": "merge", "sparse": "none", "parameters": {"weight": 0.3}}
    assert examine(Recipe.model_validate({**values, "compose": merge})).problems == ()
    wanted = looked(world, calibration_windows=4096).notes
    assert len(wanted) == 3 and "calibration_windows 4096 of 32 would take 131072" in wanted[0]


def test_text_that_is_in_two_places(world: Any, tmp_path: Path) -> None:
    values = world.recipe()
    letters, numbers, colours = (expert["domain"] for expert in values["experts"])
    letters["heldout"] = letters["calibration"]
    rows = read_documents(numbers["calibration"])
    write_documents(tmp_path / "mixed.jsonl", [*rows[:5], "one two three four five six seven"])
    numbers["heldout"] = str(tmp_path / "mixed.jsonl")
    colours["calibration"] = numbers["calibration"]
    found = examine(Recipe.model_validate(values))
    assert found.problems == ()
    text = "\n".join(found.notes)
    assert "expert letters: its held-out text is its calibration text" in text
    assert "expert numbers: 5 of 6 held-out documents are in its calibration text" in text
    assert "experts numbers and colours share 24 calibration documents" in text


@pytest.fixture(scope="module")
def adapter(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = LlamaForCausalLM.from_pretrained(world.base)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def test_an_adapter_that_fits_is_not_merged(world: Any, adapter: Path) -> None:
    before = sorted(adapter.iterdir())
    assert with_model(world, adapter) == Preflight((), ())
    assert sorted(adapter.iterdir()) == before


def _rename(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "layers.7."): t for name, t in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors")


def _widen(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_A" in name)
    weights[name] = torch.zeros(4, 64)
    save_file(weights, folder / "adapter_model.safetensors")


def _embed(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(400, 32)
    save_file(weights, folder / "adapter_model.safetensors")


def _field(name: str, value: Any) -> Change:
    return lambda folder: edit(folder / "adapter_config.json", lambda c: c.update({name: value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, r"it changes model\.layers\.7\..*belongs to another base"),
        (_widen, "is for 64 features where the base's .* has 32"),
        (_embed, "embeddings of 400 tokens where the base has"),
        (_field("peft_type", None), "expected a peft_type"),
        (_field("task_type", "SEQ_CLS"), "causal language model, but it is for SEQ_CLS"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "only safetensors"),
    ],
)
def test_an_adapter_of_another_base(
    world: Any, adapter: Path, tmp_path: Path, change: Change, message: str
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "lora"))
    change(folder)
    [problem] = with_model(world, folder).problems
    assert re.search(f"expert numbers, the adapter .*{message}", problem)


def test_an_adapter_that_names_another_base(world: Any, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "lora"))
    _field("base_model_name_or_path", str(world.finetunes["letters"]))(folder)
    [problem] = with_model(world, folder).problems
    assert "whose weights are not those of" in problem
    _field("base_model_name_or_path", "org/another")(folder)
    found = with_model(world, folder)
    assert found.problems == () and "names org/another as its base" in found.notes[0]
    shutil.copytree(world.base, tmp_path / "copy")
    _field("base_model_name_or_path", str(tmp_path / "copy"))(folder)
    assert with_model(world, folder) == Preflight((), ())


def test_an_adapter_with_a_tokenizer_of_its_own(world: Any, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "lora"))
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    [problem] = with_model(world, folder).problems
    assert "its tokenizer has another vocabulary than the base's" in problem


def test_all_problems_come_at_once(world: Any, tmp_path: Path) -> None:
    model = copy(world, tmp_path / "other")
    edit(model / "config.json", lambda c: c.update(rms_norm_eps=1e-3, num_attention_heads=2))
    values = world.recipe(evaluate={"problems": {"a": "no", "b": "none"}}, compose={"layers": [9]})
    values["experts"][1]["model"] = str(model)
    values["experts"][2]["domain"] = {}
    with pytest.raises(InputError, match="cannot be built, 6 problems") as caught:
        preflight(Recipe.model_validate(values))
    lines = str(caught.value).splitlines()
    assert len(lines) == 7 and all(line.startswith("  - ") for line in lines[1:])
