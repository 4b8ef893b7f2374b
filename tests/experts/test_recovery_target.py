"""What block recovery trains towards: the unpruned model's hidden states, or the block's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from moiety.errors import InputError
from moiety.experts import BlockRecovery, PruneSettings, prune
from moiety.experts.blocks import BlockPruner, BlockResult
from moiety.experts.calibrate import BlockBatch
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.pattern import Pattern
from moiety.experts.prune import read_report
from moiety.experts.stream import StreamedModel
from moiety.text import Windows

LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A random Llama, saved in its `name_or_path`, in fp32 when given."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, initializer_range=0.3))
    made.to(request.param).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def windows() -> Windows:
    """Eleven windows of 20 tokens, the last one padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (11, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 12:] = 0
    return Windows(
        ids_WC=ids, mask_WC=mask, document_W=torch.arange(11), bytes_W=torch.ones(11).long()
    )


def pruner(model: PreTrainedModel, recovery: BlockRecovery | None) -> BlockPruner:
    checkpoint = Checkpoint(Path(str(model.name_or_path)))
    settings = PruneSettings(sites="all", batch_size=2, recovery=recovery, values="fp32")
    stream = StreamedModel(checkpoint.config, checkpoint)
    return BlockPruner(stream, settings, [Pattern(2, 4)] * LAYERS)


def outputs(model: PreTrainedModel) -> list[Tensor]:
    """What each block of the whole dense model puts out, (W, C, D)."""
    found: list[Tensor] = []
    blocks: Any = model.get_submodule("model.layers")
    handles = [
        block.register_forward_hook(lambda _b, _i, out: found.append(out)) for block in blocks
    ]
    with torch.no_grad():
        model(input_ids=windows().ids_WC)
    for handle in handles:
        handle.remove()
    return found


def dense_states(batches: list[BlockBatch]) -> Tensor:
    states = [batch.dense_WCD for batch in batches]
    assert all(state is not None for state in states)
    return torch.cat([state for state in states if state is not None])


def error(found_WCD: Tensor, target_WCD: Tensor) -> float:
    """Mean over unpadded tokens of the relative error of hidden states."""
    seen_WC = windows().mask_WC.bool()
    found_TD, target_TD = found_WCD[seen_WC].float(), target_WCD[seen_WC]
    return float(((found_TD - target_TD).square().sum(-1) / target_TD.square().sum(-1)).mean())


def test_targets_are_the_dense_models_hidden_states(model: PreTrainedModel) -> None:
    one = pruner(model, BlockRecovery(epochs=1))
    batches = one.capture(windows())
    dtype = batches[0].hidden_WCD.dtype
    rounding = 1e-10 if dtype == torch.float32 else 1e-4
    for index, expected_WCD in enumerate(outputs(model)):
        one.prune(index, batches)
        found_WCD = dense_states(batches)
        assert found_WCD.dtype == dtype
        assert error(found_WCD, expected_WCD) < rounding
        assert error(torch.cat([batch.hidden_WCD for batch in batches]), expected_WCD) > 1e-2


def test_a_block_done_before_sends_both_streams_on(model: PreTrainedModel) -> None:
    one = pruner(model, BlockRecovery(epochs=1))
    batches, again = one.capture(windows()), one.capture(windows())
    for index in range(LAYERS):
        result = one.prune(index, batches)
        one.repeat(index, again, BlockResult.read(result.tensors, result.figures()))
        assert torch.equal(dense_states(again), dense_states(batches))
        for before, after in zip(batches, again, strict=True):
            assert torch.equal(after.hidden_WCD, before.hidden_WCD)


def test_the_dense_models_states_are_the_better_target(model: PreTrainedModel) -> None:
    errors: dict[str, float] = {}
    expected_WCD = outputs(model)[-1]
    for target in ("model", "block"):
        one = pruner(model, BlockRecovery(epochs=8, target=target))
        batches = one.capture(windows())
        for index in range(LAYERS):
            recovery = one.prune(index, batches).recovery
            assert recovery is not None
            assert recovery["error_after"] <= recovery["error_before"]
        errors[target] = error(torch.cat([batch.hidden_WCD for batch in batches]), expected_WCD)
    assert errors["model"] <= errors["block"]


@pytest.mark.parametrize("recovery", [None, BlockRecovery(epochs=1, target="block")])
def test_no_second_stream_where_none_is_wanted(
    model: PreTrainedModel, recovery: BlockRecovery | None
) -> None:
    one = pruner(model, recovery)
    batches = one.capture(windows())
    one.prune(0, batches)
    assert all(batch.dense_WCD is None for batch in batches)


def test_reports_from_before_there_was_a_choice(world: Any, tmp_path: Path) -> None:
    text, out = world.texts["letters"]["calibration"], tmp_path / "out"
    recovery = BlockRecovery(epochs=1)
    settings = PruneSettings(recovery=recovery, context_length=32, windows=4)
    report = prune(world.finetunes["letters"], out, text, settings)
    assert read_report(out).settings == report.settings == settings
    values = json.loads((out / "pruning.json").read_text())
    del values["settings"]["recovery"]["target"]
    (out / "pruning.json").write_text(json.dumps(values))
    found = read_report(out).settings.recovery
    assert found == BlockRecovery(epochs=1, target="block")


def test_the_choices_are_named() -> None:
    with pytest.raises(InputError, match="target must be one of model, block, not 'dense'"):
        BlockRecovery(target="dense")
