"""Streaming: block by block gives exactly what the whole model computes, and drops its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.stream import StreamedModel
from moiety.text import Windows

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": GROUPED,
    "MistralConfig": {**GROUPED, "sliding_window": 8},
    "Gemma2Config": {**GROUPED, "head_dim": 8, "sliding_window": 8},
    "Gemma3TextConfig": {**GROUPED, "head_dim": 8, "sliding_window": 8},
    "Phi3Config": {**GROUPED, "pad_token_id": 0},
    "GPTNeoXConfig": SIZES,
    "OPTConfig": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "BloomConfig": {"vocab_size": 100, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "CohereConfig": GROUPED,
}


def windows() -> Windows:
    """Five windows of 24 tokens, the last one padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (5, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 15:] = 0
    return Windows(
        ids_WC=ids, mask_WC=mask, document_W=torch.arange(5), bytes_W=torch.ones(5).long()
    )


def streamed(folder: Path, text: Windows) -> tuple[StreamedModel, torch.Tensor]:
    """The hidden states behind the last block, computed block by block."""
    checkpoint = Checkpoint(folder)
    stream = StreamedModel(checkpoint.config, checkpoint)
    batches = stream.capture(text, batch_size=2)
    for index in range(len(stream)):
        stream.enter(index, batches)
        with stream.block(index) as block, torch.no_grad():
            for batch in batches:
                batch.hidden_WCD = batch.run(block)
    return stream, torch.cat([batch.hidden_WCD for batch in batches])


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_is_the_whole_model(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, family)(**FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    text = windows()
    stream, found = streamed(tmp_path, text)
    expected: list[torch.Tensor] = []
    model.get_submodule(stream.prefix)[-1].register_forward_hook(  # pyright: ignore[reportIndexIssue]
        lambda _block, _input, output: expected.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    with torch.no_grad():
        model(input_ids=text.ids_WC, attention_mask=text.mask_WC)
    seen = text.mask_WC.bool()
    torch.testing.assert_close(found[seen], expected[0][seen], rtol=1e-5, atol=1e-5)
    assert all(parameter.is_meta for parameter in stream.model.parameters())


def test_hidden_states_keep_the_checkpoints_dtype(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**GROUPED)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    stream = StreamedModel(checkpoint.config, checkpoint)
    batches = stream.capture(windows(), batch_size=4)
    assert {batch.hidden_WCD.dtype for batch in batches} == {torch.bfloat16}
    with stream.block(0) as block:
        assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}


def test_a_missing_or_misshapen_weight_is_named(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(transformers.LlamaConfig(**GROUPED)).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = dict(checkpoint)
    short = {**tensors, name: tensors[name][:5]}
    del tensors[name]
    for damaged, message in ((tensors, "up_proj.weight.*is missing"), (short, r"\(48, 32\)")):
        with pytest.raises(InputError, match=message):
            stream = StreamedModel(checkpoint.config, damaged)
            with stream.block(1):
                pass


def test_mixtures_are_refused_by_reason(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="mixtures of experts"):
        streamed(tmp_path, windows())
