"""Plans count what models hold: shapes against real caches, files, builds and published sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from moiety.analysis.planner import plan
from moiety.analysis.planner import sources as planner_sources
from moiety.analysis.planner.cards import find_card
from moiety.analysis.planner.formats import FORMATS, Format
from moiety.analysis.planner.memory import cache_bytes
from moiety.analysis.planner.sources import take_stock
from moiety.analysis.planner.tables import plan_tables
from moiety.compose import Recipe
from moiety.compose.costs import composite_bytes, sizes_of
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.write import stored_bytes
from moiety.units import parse_size
from tests.experts.packs import EXPERTS, tiny_mixtral, write_packed

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
MIXED = ["sliding_attention", "full_attention"] * 2
QWEN_32B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def qwen_32b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of Qwen2.5-32B and nothing else."""
    folder = tmp_path_factory.mktemp("qwen")
    Qwen2Config(**QWEN_32B, dtype="bfloat16").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        MistralConfig(**SMALL, sliding_window=6),
        Gemma3TextConfig(**SMALL, layer_types=MIXED, sliding_window=5),
        Qwen3MoeConfig(**SMALL, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
        DeepseekV3Config(**{**SMALL, **MLA}),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("context", [3, 16])
def test_cache_is_what_transformers_keeps(config: Any, context: int) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.full((2, context), 3), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(config, context, 2, "fp32") == held


def test_published_example_of_32b_at_4_bits_and_32k(qwen_32b: Path) -> None:
    """gigagpu.com/qwen-2-5-32b-vram-requirements: 65 GB in bf16, 262 kB of cache a token.

    It counts 17.2 GB for 4-bit weights as if embeddings and head were rounded too; they are not,
    which is why the checkpoint Qwen2.5-32B-Instruct-AWQ has 19.3 GB.
    """
    found = plan(qwen_32b, gpu="rtx4090", context=32768)
    uses = {use.name: use for use in found.uses}
    assert found.use.weights == pytest.approx(65e9, rel=0.01)
    assert found.use.cache == 32768 * 262144
    assert uses["dense int4"].weights == pytest.approx(19.3e9, rel=0.01)
    embeddings = sum(part.bytes for part in found.parts if part.name in ("embeddings", "head"))
    all_rounded = uses["dense int4"].weights - embeddings * (1 - 4.125 / 16)
    assert all_rounded == pytest.approx(17.2e9, rel=0.03)
    assert not uses["dense int4"].fits and 16_000 < (uses["dense int4"].longest or 0) < 32768
    assert uses["2:4 int4"].fits
    speed = uses["dense int4"].tokens_per_second
    assert speed is not None and 30 < speed < 50


def test_longest_context_is_the_last_that_fits(qwen_32b: Path) -> None:
    found = next(u for u in plan(qwen_32b, gpu="24GiB").uses if u.name == "2:4 int8")
    assert found.longest is not None and 0 < found.longest < 32768
    for context, fits in ((found.longest, True), (found.longest + 1, False)):
        again = plan(qwen_32b, gpu="24GiB", context=context)
        assert next(u for u in again.uses if u.name == "2:4 int8").fits is fits


def test_packed_mixture_is_counted_from_its_headers(tmp_path: Path) -> None:
    model = tiny_mixtral(hidden_size=64, intermediate_size=128).bfloat16()
    folder = write_packed(model, tmp_path, EXPERTS, "2:4", "int8")
    found, dense = plan(folder, gpu="1GB", batch=2), plan(tmp_path / "dense")
    assert found.use.weights == stored_bytes(Checkpoint(folder))
    assert dense.use.weights == stored_bytes(Checkpoint(tmp_path / "dense"))
    assert (found.experts, found.active) == (3, 2)
    kinds = {part.name: part.kind for part in found.parts}
    assert kinds["experts"] == "2:4 int8" and kinds["attention"] == "dense bf16"
    by_name = {use.name: use for use in dense.uses}
    experts = 2 * 3 * 3 * 64 * 128
    saved = by_name["as it is"].weights - by_name["2:4 bf16"].weights
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32)
    assert saved == 2 * (experts + attention) * 7 // 16
    assert dense.use.read < dense.use.weights + dense.use.cache


def test_configuration_alone_counts_as_the_saved_model(tmp_path: Path) -> None:
    model = tiny_mixtral().bfloat16()
    model.save_pretrained(tmp_path / "whole")
    config = AutoConfig.from_pretrained(tmp_path / "whole")
    config.save_pretrained(tmp_path / "config")
    whole, alone = (plan(tmp_path / name) for name in ("whole", "config"))
    assert alone.parts == whole.parts
    assert plan(tmp_path / "config" / "config.json").use == alone.use


def test_most_experts_fill_the_card(tmp_path: Path) -> None:
    model = tiny_mixtral().bfloat16()
    model.save_pretrained(tmp_path)
    stock = take_stock(tmp_path)
    one = stock.bytes_of_expert(None)
    assert stock.bytes_in(None, 5) - stock.bytes_in(None) == 2 * one
    found = plan(tmp_path, overhead="0B", context=32)
    card = f"{found.use.total + 4 * one}B"
    use = plan(tmp_path, gpu=card, overhead="0B", context=32).use
    assert use.most_experts == 7 and use.longest == 64


COMPOSITES = [
    {"kind": "mixture", "shared": "base"},
    {"kind": "mixture", "shared": "base", "layers": [1]},
    {"kind": "routed", "shared": "base"},
    {"kind": "routed", "base": "none", "shared": "base"},
    {"kind": "merge", "sparse": "none"},
    {"kind": "merge"},
    {"kind": "merge", "sparse": "conflict_aware", "parameters": {"weight": 0.3}},
    {"kind": "ensemble"},
]


@pytest.mark.parametrize("compose", COMPOSITES, ids=str)
def test_recipes_count_as_builds_do(world: Any, compose: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(world.recipe(compose=compose))
    stock = planner_sources.of_recipe(recipe)
    assert stock.bytes_in(None) == composite_bytes(
        recipe, sizes_of(recipe, Checkpoint(recipe.base))
    )
    assert stock.bytes_in(FORMATS[-1]) < stock.bytes_in(None)
    assert stock.experts == (0 if compose["kind"] == "merge" else 3)
    assert stock.caches == (3 if compose["kind"] == "ensemble" else 1)
    assert stock.bytes_read(None, 1) <= stock.bytes_in(None)


def test_a_hub_id_is_planned_from_headers(monkeypatch: Any, qwen_32b: Path) -> None:
    config = AutoConfig.from_pretrained(qwen_32b)

    class Info:
        shape, dtype = (5120, 5120), "BF16"

    class File:
        tensors = {"model.layers.0.self_attn.q_proj.weight": Info}  # noqa: RUF012

    class Found:
        files_metadata = {"model.safetensors": File}  # noqa: RUF012

    monkeypatch.setattr(planner_sources, "_config", lambda source: config)
    monkeypatch.setattr(
        planner_sources.huggingface_hub, "get_safetensors_metadata", lambda name: Found
    )
    assert plan("some/model").use.weights == 2 * 5120 * 5120


def test_quantities_and_cards() -> None:
    assert [parse_size(text) for text in ("16GB", "1.5 MiB", "7", "80mb")] == [
        16 * 10**9,
        1572864,
        7,
        80 * 10**6,
    ]
    assert find_card("RTX 4090").bandwidth == 1008e9
    assert find_card("16GB", "672GB/s").bandwidth == 672e9
    assert Format("int4").bytes_of((3, 256)) == 3 * 128 + 3 * 2 * 2
    for wrong in ("16XB", "rtx9999", ""):
        with pytest.raises(InputError, match="gpu must"):
            find_card(wrong)


def test_wrong_requests_are_refused(qwen_32b: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"context": 0}, "context must"),
        ({"cache": "fp2"}, "cache must"),
        ({"bandwidth": "1GB/s"}, "expected gpu"),
        ({"overhead": "much"}, "overhead must"),
    ]
    for settings, said in wrong:
        with pytest.raises(InputError, match=said):
            plan(qwen_32b, **settings)
    with pytest.raises(InputError, match="expected a recipe"):
        plan(tmp_path)


def test_tables_and_json(qwen_32b: Path) -> None:
    found = plan(qwen_32b, gpu="80GB", context=4096)
    parts, uses = plan_tables(found)
    assert parts.rows[0][:2] == ("ffn", "dense bf16")
    assert [row[6] for row in uses.rows] == ["yes"] * 6
    assert {row[-1] for row in uses.rows} == {"\N{EN DASH}"}
    assert "limit is 32,768" in uses.note
    written = json.loads(json.dumps(found.to_dict()))
    assert written["uses"][0]["total"] == found.use.total
