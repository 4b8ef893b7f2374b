"""Packed models written dense: the same model in stock names, for other engines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moiety.errors import InputError, OutputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.export import export_dense
from moiety.experts.kernels import layouts
from moiety.progress import Silent

IDS = torch.arange(3, 43).reshape(2, 20)
LINEARS = [
    f"model.layers.{layer}.{name}_proj"
    for layer in range(2)
    for name in ("mlp.gate", "mlp.up", "mlp.down", "self_attn.q")
]


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return model(input_ids=IDS).logits


class Listener(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize(("pattern", "values"), [("2:4", "bf16"), ("0.5", "int8"), ("4:8", "int4")])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_export_is_the_model(
    packs: Any, world: Any, tmp_path: Path, kind: str, pattern: str, values: str
) -> None:
    if kind == "llama":
        model = AutoModelForCausalLM.from_pretrained(world.finetunes["letters"])
        packed = packs.write_packed(model, tmp_path, LINEARS, pattern, values)
    else:
        packed = packs.write_packed(packs.tiny_mixtral(), tmp_path, packs.EXPERTS, pattern, values)
    report = export_dense(packed, tmp_path / "out")
    assert report.matrices == (8 if kind == "llama" else 18)
    assert report.packed_bytes < report.dense_bytes
    torch.testing.assert_close(logits(packed), logits(tmp_path / "out"), rtol=1e-5, atol=1e-5)
    stock, dense = Checkpoint(tmp_path / "dense"), Checkpoint(tmp_path / "out")
    assert set(stock) == set(dense)
    assert all(torch.equal(stock[name], dense[name]) for name in stock)
    config, before = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "dense")
    )
    assert config == before


def test_integers_in_16_bits_are_the_rounded_model(
    packs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packs.tiny_mixtral().bfloat16()
    packed = packs.write_packed(model, tmp_path, packs.EXPERTS, "2:4", "int8")
    listener = Listener()
    export_dense(packed, tmp_path / "out", progress=listener)
    assert any("rounded to bfloat16" in note for note in listener.notes)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    rounded = logits(tmp_path / "out")
    torch.testing.assert_close(logits(packed), rounded, rtol=2e-2, atol=2e-2)
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "library", lambda: None)
        assert torch.equal(logits(packed), rounded)
    exact = Listener()
    export_dense(packed, tmp_path / "exact", dtype=torch.float32, progress=exact)
    assert not exact.notes
    torch.testing.assert_close(
        logits(packed, dtype=torch.float32), logits(tmp_path / "exact"), rtol=1e-5, atol=1e-5
    )
    assert json.loads((tmp_path / "exact" / "config.json").read_text())["dtype"] == "float32"


def test_tokenizer_templates_and_generation_settings_come_along(
    packs: Any, world: Any, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.finetunes["letters"])
    packed = packs.write_packed(model, tmp_path, LINEARS, "2:4", "bf16")
    world.tokenizer.save_pretrained(packed)
    (packed / "chat_template.jinja").write_text("{{ messages }}")
    (packed / "additional_chat_templates").mkdir()
    (packed / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (packed / "pruning.json").write_text("{}")
    config = json.loads((packed / "config.json").read_text())
    config["moiety"] = {"experts": ["a"]}
    (packed / "config.json").write_text(json.dumps(config))
    export_dense(packed, tmp_path / "out", "fp16", shard_bytes=50_000)
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert {"chat_template.jinja", "additional_chat_templates/tools.jinja"} <= names
    assert "generation_config.json" in names and "pruning.json" not in names
    assert "model.safetensors.index.json" in names
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.dtype == torch.float16 and written.config.moiety == {"experts": ["a"]}


def test_what_cannot_be_exported_is_refused(packs: Any, tmp_path: Path) -> None:
    packed = packs.write_packed(packs.tiny_mixtral(), tmp_path, packs.EXPERTS, "2:4", "bf16")
    with pytest.raises(InputError, match="dense already"):
        export_dense(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(InputError, match="dtype must be one of bf16, fp16, fp32, but it is int8"):
        export_dense(packed, tmp_path / "out", "int8")
    with pytest.raises(OutputError, match="holds files"):
        export_dense(packed, tmp_path / "dense")
    config = json.loads((packed / "config.json").read_text())
    vector = {**config, "moiety": {"task_vector_of": "base"}}
    (packed / "config.json").write_text(json.dumps(vector))
    with pytest.raises(InputError, match="differences to a base"):
        export_dense(packed, tmp_path / "out")
    (packed / "config.json").write_text(json.dumps(config))
    tensors = load_file(packed / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e9
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight: expected values within .* float16"):
        export_dense(packed, tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists()
