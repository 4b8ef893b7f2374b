"""Traces of every kind of gate, of generated text, and of runs that were killed."""

import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moiety.analysis.trace import Trace, trace_model
from moiety.analysis.trace.parts import Parts
from moiety.errors import InputError
from moiety.routers import find_gates, forced, one_hot
from moiety.text import Windows, token_windows

TEXTS = {
    "law": ["The court of appeal held that the court held."],
    "code": ["def add(a, b): return"],
}
SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "intermediate_size_mlp": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "n_shared_experts": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "top_k_experts": 2,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
FAMILIES = {
    "olmoe": 3,
    "deepseek_v2": 2,
    "deepseek_v3": 2,
    "gpt_oss": 3,
    "granitemoe": 3,
    "llama4_text": 3,
    "hunyuan_v1_moe": 3,
    "ernie4_5_moe": 2,
    "jetmoe": 6,
    "gemma4_text": 3,
    "inkling_text": 3,
}


def family(name: str) -> Any:
    """A tiny random model of a stock architecture, its gates far from even."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES)
    model = AutoModelForCausalLM.from_config(config).eval()
    for gate in find_gates(model):
        for parameter in gate.module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def data(tokenizer: Any) -> dict[str, Windows]:
    return {name: token_windows(tokenizer, docs, 12, minimum=3) for name, docs in TEXTS.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_gate(
    name: str, tokenizer: Any, data: dict[str, Windows], tmp_path: Path
) -> None:
    model = family(name)
    found = Trace.open(trace_model(model, tokenizer, data, tmp_path / "t", batch_size=2))
    assert len(found.header.layers) == FAMILIES[name]
    assert found.header.active == 2 and len(found.header.experts) == 8
    assert len(numpy.unique(found.experts_TLA)) > 4
    assert (found.experts_TLA[..., 0] != found.experts_TLA[..., 1]).all()
    assert (numpy.diff(found.weights_TLA, axis=-1) <= 0).all() and found.weights_TLA.min() >= 0
    if name == "jetmoe":
        with (
            pytest.raises(InputError, match="traced, not forced"),
            forced(find_gates(model), one_hot(1)),
        ):
            trace_model(model, tokenizer, data, tmp_path / "f")
        return
    with forced(find_gates(model), one_hot(1)):
        one = Trace.open(trace_model(model, tokenizer, data, tmp_path / "f"))
    assert set(one.experts_TLA[..., 0].ravel().tolist()) == {1}


def test_a_gate_that_gives_probabilities_has_the_entropy_of_these(
    tokenizer: Any, data: dict[str, Windows], tmp_path: Path
) -> None:
    model = family("gemma4_text")
    found = Trace.open(trace_model(model, tokenizer, data, tmp_path / "t", batch_size=1))
    given: list[Any] = []
    gate = find_gates(model)[0]
    gate.module.register_forward_hook(lambda _module, _inputs, output: given.append(output[0]))
    with torch.no_grad():
        model(data["law"].ids_WC[:1][:, data["law"].mask_WC[0].bool()])
    entropy_T = torch.special.entr(given[0]).sum(-1)
    numpy.testing.assert_allclose(found.entropy_TL[: len(entropy_T), 0], entropy_T, atol=1e-4)
    assert found.entropy_TL[:, 0].min() < 0.9 * numpy.log(8)


def test_a_gate_of_negative_weights_is_refused_at_once(
    tokenizer: Any, data: dict[str, Windows], tmp_path: Path
) -> None:
    model = family("gemma4_text")
    torch.nn.init.constant_(model.get_parameter("model.layers.0.router.per_expert_scale"), -1.0)
    with pytest.raises(InputError, match=r"layers\.0\.router to give weights of at least 0"):
        trace_model(model, tokenizer, data, tmp_path / "t", batch_size=1)


def test_generated_text_is_traced_as_one_pass_would(
    model: Any, tokenizer: Any, data: dict[str, Windows], tmp_path: Path
) -> None:
    """Prompt and written tokens get the routes and losses of a plain pass over both."""
    path = trace_model(model, tokenizer, data, tmp_path / "g", new_tokens=5, batch_size=3)
    found = Trace.open(path)
    prompts = sum(int(windows.mask_WC.sum()) for windows in data.values())
    assert (found.phase_T == 0).sum() == prompts
    assert (found.phase_T == 1).sum() == 4 * sum(len(windows) for windows in data.values())
    assert numpy.isnan(found.loss_T[found.phase_T == 0]).all()
    keys = numpy.stack([found.document_T, found.window_T])
    for document, window in numpy.unique(keys, axis=1).T:
        rows = numpy.flatnonzero((keys[0] == document) & (keys[1] == window))
        assert found.position_T[rows].tolist() == list(range(len(rows)))
        ids_1C = torch.tensor(found.token_id_T[rows])[None].long()
        whole = Windows(
            ids_WC=ids_1C,
            mask_WC=torch.ones_like(ids_1C),
            document_W=torch.tensor([0]),
            bytes_W=torch.tensor([0]),
        )
        out = tmp_path / f"{document}.{window}"
        again = Trace.open(trace_model(model, tokenizer, {"all": whole}, out))
        assert numpy.array_equal(again.experts_TLA, found.experts_TLA[rows])
        decoded = found.phase_T[rows] == 1
        numpy.testing.assert_allclose(again.loss_T[decoded], found.loss_T[rows][decoded], atol=1e-4)


def test_tokens_after_the_end_are_left_out(
    model: Any, tokenizer: Any, data: dict[str, Windows], tmp_path: Path
) -> None:
    plain = Trace.open(trace_model(model, tokenizer, data, tmp_path / "p", new_tokens=6))
    written = plain.token_id_T[plain.phase_T == 1]
    model.generation_config.eos_token_id = int(written[0])
    ended = Trace.open(trace_model(model, tokenizer, data, tmp_path / "e", new_tokens=6))
    assert len(ended) < len(plain)
    assert (ended.phase_T == 0).sum() == (plain.phase_T == 0).sum()


class Killed(Exception):
    """Stands for a process that is gone."""


def test_a_killed_trace_goes_on_and_ends_the_same(
    model: Any,
    tokenizer: Any,
    data: dict[str, Windows],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[Parts.__module__], "SECONDS_A_PART", -1.0)
    whole = Trace.open(trace_model(model, tokenizer, data, tmp_path / "whole", batch_size=1))
    calls: list[int] = []

    def counting(stop: int | None) -> Any:
        def hook(*_: Any) -> None:
            if len(calls) == stop:
                raise Killed
            calls.append(1)

        return model.register_forward_pre_hook(hook)

    handle = counting(stop=1)
    with pytest.raises(Killed):
        trace_model(model, tokenizer, data, tmp_path / "t", batch_size=1, key="one")
    handle.remove()
    assert not (tmp_path / "t").exists() and (tmp_path / "t.parts").is_dir()
    handle = counting(stop=None)
    calls.clear()
    again = Trace.open(trace_model(model, tokenizer, data, tmp_path / "t", batch_size=1, key="one"))
    handle.remove()
    assert len(calls) == sum(len(windows) for windows in data.values()) - 1
    assert not (tmp_path / "t.parts").exists()
    assert numpy.array_equal(again.experts_TLA, whole.experts_TLA)
    assert again.header == whole.header
    assert (tmp_path / "t/routes.parquet").read_bytes() == (
        tmp_path / "whole/routes.parquet"
    ).read_bytes()


def test_parts_of_another_trace_are_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    Parts(folder, "one")
    (folder / "00000000-00000004.parquet").write_bytes(b"")
    (folder / "00000009-00000012.parquet").write_bytes(b"")
    assert Parts(folder, "one").done == 4
    assert Parts(folder, "two").done == 0
    assert sorted(path.name for path in folder.iterdir()) == ["key.json"]
