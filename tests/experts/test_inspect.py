"""What inspecting shows: groups, patterns, stored bytes, and drift from the base."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from moiety.errors import InputError
from moiety.experts.anatomy import found_pattern, group_of
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.inspect import (
    DRIFT_COLUMNS,
    GROUP_COLUMNS,
    TENSOR_COLUMNS,
    InspectReport,
    inspect,
)
from moiety.experts.pattern import Pattern

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("transformer.wte.weight", "embeddings"),
        ("gpt_neox.embed_in.weight", "embeddings"),
        ("model.decoder.embed_positions.weight", "embeddings"),
        ("embed_out.weight", "head"),
        ("lm_head.weight", "head"),
        ("model.layers.3.self_attn.q_proj.bias", "attention"),
        ("h.0.attn.c_attn.weight", "attention"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "attention"),
        ("model.layers.3.self_attn.q_norm.weight", "norms"),
        ("model.layers.3.post_attention_layernorm.weight", "norms"),
        ("transformer.h.0.ln_1.bias", "norms"),
        ("model.layers.3.mlp.gate_proj.weight", "ffn"),
        ("model.decoder.layers.0.fc1.weight", "ffn"),
        ("model.layers.0.block_sparse_moe.experts.2.w1.weight", "ffn"),
        ("model.layers.0.mlp.experts.gate_up_proj", "ffn"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "router"),
        ("model.logit_scale", "other"),
    ],
)
def test_groups_by_name(name: str, group: str) -> None:
    assert group_of(name) == group


@pytest.mark.parametrize(
    ("pattern", "width"),
    [("2:4", 64), ("1:4", 64), ("4:8", 64), ("3:4", 64), ("5:16", 64), ("1:2", 6), ("0.25", 64)],
)
def test_patterns_are_found_on_dense_tensors(pattern: str, width: int) -> None:
    score = torch.rand(64, width, generator=torch.Generator().manual_seed(0))
    assert found_pattern(Pattern.parse(pattern).mask(score, within="matrix")) == pattern


def test_stronger_patterns_win_and_few_zeros_are_dense() -> None:
    score = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0))
    assert found_pattern(Pattern(1, 4).mask(score) & Pattern(4, 8).mask(score)) == "1:4"
    assert found_pattern(score > 0.002) == found_pattern(score[0, 0] > 0.5) == "dense"
    assert found_pattern(score > 0.6) == f"{float((score > 0.6).float().mean()):.3g}"
    assert found_pattern(score < 0) == "zero"
    assert found_pattern(score[:0] > 0) == "dense"


def test_every_tensor_of_a_dense_model(world: Any) -> None:
    [model] = inspect([world.base]).models
    checkpoint = Checkpoint(world.base)
    assert [tensor.name for tensor in model.tensors] == list(checkpoint)
    assert all(tensor.pattern == "dense" and not tensor.packed for tensor in model.tensors)
    by_group = {group.group: group for group in model.groups}
    assert list(by_group) == ["embeddings", "attention", "ffn", "norms", "all"]
    assert by_group["all"].bytes == sum(tensor.nbytes for tensor in checkpoint.values())
    assert by_group["attention"].tensors == 8 and by_group["ffn"].tensors == 6
    assert by_group["ffn"].weights == 2 * 3 * 32 * 48


def changed(world: Any, folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    """A copy of the base with other tensors and other fields of its configuration."""
    folder.mkdir()
    config = json.loads((world.base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    stored = {**load_file(world.base / "model.safetensors"), **tensors}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_zeros_rows_and_columns_are_counted(world: Any, tmp_path: Path) -> None:
    weight = Checkpoint(world.base)[UP].clone()
    weight[[3, 7]] = 0
    weight[:, 11] = 0
    [model] = inspect([changed(world, tmp_path / "model", {UP: weight})]).models
    [found] = [tensor for tensor in model.tensors if tensor.name == UP]
    assert (found.zero_rows, found.zero_columns) == (2, 1)
    assert found.zeros == 2 * 32 + 46
    assert found.pattern == f"{1 - found.zeros / found.weights:.3g}"


@pytest.mark.parametrize("values", ["bf16", "fp32", "int8", "int4"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_packed_models_are_seen_as_they_are_stored(
    world: Any, packs: ModuleType, tmp_path: Path, pattern: str, values: str
) -> None:
    model = LlamaForCausalLM.from_pretrained(world.base)
    folder = packs.write_packed(
        model, tmp_path, packs.LINEARS, pattern, values, {packs.LINEARS[0]: "1:4"}
    )
    report = inspect([folder], base=tmp_path / "dense")
    dense, packed = report.models
    stored = Checkpoint(folder)
    assert [t.name for t in packed.tensors] == [t.name for t in dense.tensors]
    total = {group.group: group for group in packed.groups}["all"]
    assert total.bytes == sum(tensor.nbytes for tensor in stored.values())
    for own, twin in zip(packed.tensors, dense.tensors, strict=True):
        module = own.name.removesuffix(".weight")
        assert own.packed == (module in packs.LINEARS) and not twin.packed
        assert (own.shape, own.zeros) == (twin.shape, twin.zeros)
        assert own.dtype == (values if own.packed else "fp32")
        if own.packed:
            assert own.pattern == ("1:4" if module == packs.LINEARS[0] else pattern)
            assert twin.pattern == own.pattern or ":" not in own.pattern
            assert own.bytes < twin.bytes
    assert report.drift is not None
    [drift] = report.drift.models
    assert drift.groups[-1].unchanged == 1 and drift.groups[-1].relative == 0


def test_experts_of_a_packed_mixture(packs: ModuleType, tmp_path: Path) -> None:
    folder = packs.write_packed(packs.tiny_mixtral(), tmp_path, packs.EXPERTS, "2:4", "bf16")
    packed, dense = inspect([folder, tmp_path / "dense"]).models
    assert [t.pattern for t in packed.tensors] == [t.pattern for t in dense.tensors]
    groups = {group.group: group for group in packed.groups}
    assert groups["ffn"].patterns == "2:4" and groups["router"].tensors == 2
    assert 8 * groups["ffn"].bytes == 9 * groups["ffn"].weights


def drift_of(report: InspectReport, model: str) -> dict[str, Any]:
    assert report.drift is not None
    [found] = [own for own in report.drift.models if own.model == model]
    return {group.group: group for group in found.groups}


def test_drift_and_agreement_match_plain_arithmetic(world: Any) -> None:
    paths = list(world.finetunes.values())
    report = inspect(paths, base=world.base)
    base = {name: tensor.double() for name, tensor in Checkpoint(world.base).items()}
    deltas = [
        {name: tensor.double() - base[name] for name, tensor in Checkpoint(path).items()}
        for path in paths
    ]

    def flat(tensors: Any, group: str) -> torch.Tensor:
        return torch.cat([tensors[n].flatten() for n in base if group in ("all", group_of(n))])

    for path, delta in zip(paths, deltas, strict=True):
        for group, found in drift_of(report, str(path)).items():
            expected = float(flat(delta, group).norm() / flat(base, group).norm())
            assert math.isclose(found.relative, expected, rel_tol=1e-5)
            assert found.unchanged == float((flat(delta, group) == 0).double().mean())
    assert drift_of(report, str(paths[0]))["embeddings"].equal_tensors == 1
    assert drift_of(report, str(paths[0]))["embeddings"].relative == 0
    assert report.drift is not None
    cosines = {(own.first, own.second, own.group): own.cosine for own in report.drift.agreements}
    assert len(cosines) == 3 * 5
    for group in ("attention", "ffn", "all"):
        one, other = flat(deltas[0], group), flat(deltas[1], group)
        expected = float(one @ other / one.norm() / other.norm())
        found = cosines[str(paths[0]), str(paths[1]), group]
        assert found is not None and math.isclose(found, expected, rel_tol=1e-4)
    assert cosines[str(paths[0]), str(paths[1]), "embeddings"] is None


def test_slices_do_not_change_the_sums(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moiety.experts import drift

    whole = inspect([world.finetunes["letters"]], base=world.base).to_dict()["drift"]
    monkeypatch.setattr(drift, "SLICE", 7)
    parts = inspect([world.finetunes["letters"]], base=world.base).to_dict()["drift"]
    for one, other in zip(whole["models"][0]["groups"], parts["models"][0]["groups"], strict=True):
        relative = one.pop("relative"), other.pop("relative")
        assert math.isclose(*relative, rel_tol=1e-5)
        assert one == other


def test_models_of_other_shapes_are_listed(world: Any, tmp_path: Path) -> None:
    wide = torch.zeros(400, 32)
    other = changed(
        world,
        tmp_path / "other",
        {"model.embed_tokens.weight": wide, "lm_head.weight": wide + 1},
        vocab_size=400,
        tie_word_embeddings=False,
    )
    report = inspect([other, world.finetunes["letters"]], base=world.base)
    assert report.drift is not None
    assert report.drift.models[0].reshaped == [("model.embed_tokens.weight", (384, 32), (400, 32))]
    assert report.drift.models[0].added == ["lm_head.weight"]
    assert "embeddings" not in drift_of(report, str(other))
    back = inspect([world.base], base=other).drift
    assert back is not None and back.models[0].absent == ["lm_head.weight"]


def test_other_bits_of_the_same_value_are_not_equal(world: Any, tmp_path: Path) -> None:
    base = Checkpoint(world.base)
    norm = base["model.norm.weight"]
    half = changed(world, tmp_path / "half", {"model.norm.weight": norm.bfloat16()})
    report = inspect([half], base=world.base)
    norms = drift_of(report, str(half))["norms"]
    assert norms.unchanged == 1 and norms.relative == 0
    assert (norms.equal_tensors, norms.tensors) == (4, 5)


def test_report_is_json_and_rows_fit_their_columns(world: Any) -> None:
    report = inspect([world.base, *world.finetunes.values()], base=world.base)
    names = [model.model for model in report.models]
    assert names == [str(world.base), *map(str, world.finetunes.values())]
    values = json.loads(json.dumps(report.to_dict()))
    assert values["models"][0]["groups"][-1]["group"] == "all"
    assert values["drift"]["agreements"][0]["cosine"] is None
    model = report.models[0]
    assert {len(row) for row in model.group_rows()} == {len(GROUP_COLUMNS)}
    assert {len(row) for row in model.tensor_rows()} == {len(TENSOR_COLUMNS)}
    rows = report.drift_rows(str(world.finetunes["letters"]))
    assert {len(row) for row in rows} == {len(DRIFT_COLUMNS)}
    assert rows[0] == ("embeddings", "0.00%", "1 of 1", "100.0%")
    columns, rows = report.agreement_rows()
    assert len(rows) == 3 and {len(row) for row in rows} == {len(columns)}
    alone = inspect([world.base])
    assert alone.drift_rows(str(world.base)) == [] and alone.agreement_rows()[1] == []


def test_what_cannot_be_inspected(world: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one model"):
        inspect([])
    with pytest.raises(InputError, match="model folder or a hub id"):
        inspect([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there are none"):
        inspect([world.base, tmp_path / "empty"])
