"""Width pruning: a smaller stock model comes out, of every kind of FFN, or a reason why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moiety.errors import InputError, OutputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.neurons import column_error, keep_neurons, refit_columns
from moiety.experts.packing import pack
from moiety.experts.pattern import Pattern
from moiety.experts.quantizer import PackedConfig
from moiety.experts.shards import write_weights
from moiety.experts.width import WidthSettings, prune_width, removable
from moiety.scoring import score
from moiety.text import read_documents, token_windows

DENSE = "letters"
FAST: dict[str, Any] = {"context_length": 32, "windows": 12, "batch_size": 5}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "Mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "Qwen2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "Qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "Gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "Phi3": {"intermediate_size": 48, "num_key_value_heads": 2},
    "Phi": {"intermediate_size": 48},
    "GPTNeoX": {"intermediate_size": 48},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
OTHER_FFN: dict[str, tuple[dict[str, Any], str]] = {
    "GPTBigCode": ({"n_inner": None}, "names one FFN width"),
    "GPT2": ({"n_inner": 48}, "one FFN of linear layers with 48 neurons"),
    "Mixtral": ({"intermediate_size": 48, "num_key_value_heads": 2}, "mixtures of experts"),
    "BitNet": ({"intermediate_size": 48, "num_key_value_heads": 2}, "neuron by neuron"),
}


def build(world: Any, kind: str, changes: dict[str, Any], folder: Path) -> Path:
    """A random model of one architecture with the world's tokenizer; gives `folder`."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(world.tokenizer), **TINY, **changes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    world.tokenizer.save_pretrained(folder)
    return folder


def text(world: Any) -> Path:
    return world.texts[DENSE]["calibration"]


def logits(model: Path) -> Tensor:
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model).eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_stock_model_comes_out(world: Any, tmp_path: Path, kind: str) -> None:
    dense = build(world, kind, KINDS[kind], tmp_path / "dense")
    settings = WidthSettings(keep=0.7, **FAST)
    report = prune_width(dense, tmp_path / "out", text(world), settings)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert getattr(config, report.config_field) == report.width_after == 32
    assert not hasattr(config, "quantization_config")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    assert sum(one.numel() for one in model.parameters()) <= report.parameters_after
    assert report.parameters_after < report.parameters_before
    assert logits(tmp_path / "out").isfinite().all()
    assert logits(tmp_path / "out").shape == logits(dense).shape
    for block in report.blocks:
        assert 0 < block.error_after < block.error_cut


@pytest.mark.parametrize("kind", OTHER_FFN)
def test_other_ffns_are_refused_with_the_reason(world: Any, tmp_path: Path, kind: str) -> None:
    changes, message = OTHER_FFN[kind]
    dense = build(world, kind, changes, tmp_path / "dense")
    with pytest.raises(InputError, match=message):
        prune_width(dense, tmp_path / "out", text(world), WidthSettings(**FAST))
    assert not (tmp_path / "out").exists()


def held_loss(world: Any, model: Path) -> float:
    documents = read_documents(world.texts[DENSE]["heldout"])
    windows = token_windows(world.tokenizer, documents, 32, 48)
    return score(AutoModelForCausalLM.from_pretrained(model).eval(), windows).loss


def test_refit_brings_the_loss_closer_to_dense(world: Any, tmp_path: Path) -> None:
    losses = {}
    for refit in (False, True):
        settings = WidthSettings(keep=0.5, refit=refit, **FAST)
        out = tmp_path / str(refit)
        report = prune_width(world.finetunes[DENSE], out, text(world), settings)
        assert all((one.error_after < one.error_cut) == refit for one in report.blocks)
        losses[refit] = held_loss(world, out)
    dense = held_loss(world, world.finetunes[DENSE])
    assert abs(losses[True] - dense) < abs(losses[False] - dense)


def test_the_whole_width_is_the_same_model(world: Any, tmp_path: Path) -> None:
    settings = WidthSettings(keep=1, multiple=64, **FAST)
    report = prune_width(world.finetunes[DENSE], tmp_path / "out", text(world), settings)
    assert report.width_before == report.width_after == 48
    before, after = Checkpoint(world.finetunes[DENSE]), Checkpoint(tmp_path / "out")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bf16_models_stay_bf16(world: Any, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    model = AutoModelForCausalLM.from_pretrained(world.finetunes[DENSE], dtype=torch.bfloat16)
    model.save_pretrained(dense)
    world.tokenizer.save_pretrained(dense)
    report = prune_width(dense, tmp_path / "out", text(world), WidthSettings(**FAST))
    assert all(0 < block.error_after < block.error_cut for block in report.blocks)
    after = Checkpoint(tmp_path / "out")
    assert {after[name].dtype for name in after} == {torch.bfloat16}
    assert logits(tmp_path / "out").isfinite().all()


def test_attention_and_files_beside_the_weights_stay(world: Any, tmp_path: Path) -> None:
    dense = world.finetunes[DENSE]
    for name in ("one", "two"):
        prune_width(dense, tmp_path / name, text(world), WidthSettings(**FAST))
    before, after = Checkpoint(dense), Checkpoint(tmp_path / "one")
    for name in before:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]) == (".mlp." not in name)
    assert {path.name for path in dense.iterdir()} | {"width.json"} == {
        path.name for path in (tmp_path / "one").iterdir()
    }
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    written = json.loads((tmp_path / "one" / "width.json").read_text())
    assert (written["width_before"], written["width_after"]) == (48, 32)


def packed(dense: Path, out: Path) -> Path:
    """The dense model with one packed matrix; gives `out`."""
    shutil.copytree(dense, out)
    module = "model.layers.0.mlp.up_proj"
    checkpoint = Checkpoint(dense)
    tensors = {name: checkpoint[name] for name in checkpoint}
    weight = tensors[f"{module}.weight"]
    half = weight * Pattern(2, 4).mask(weight.abs())
    tensors |= pack(half, Pattern(2, 4)).tensors(f"{module}.weight")
    write_weights(out, sorted(tensors.items()))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = PackedConfig(pattern="2:4", modules=[module]).to_dict()
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_wrong_input_is_refused(world: Any, tmp_path: Path) -> None:
    dense, out = world.finetunes[DENSE], tmp_path / "out"
    with pytest.raises(InputError, match=r"packed is packed; prune the width of the dense one"):
        prune_width(packed(dense, tmp_path / "packed"), out, text(world), WidthSettings(**FAST))
    with pytest.raises(InputError, match="there is none"):
        prune_width(dense, out, tmp_path / "no.jsonl", WidthSettings(**FAST))
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(OutputError, match="holds files"):
        prune_width(dense, out, text(world), WidthSettings(**FAST))


@pytest.mark.parametrize(
    ("field", "value"),
    [("keep", 0.0), ("keep", 1.1), ("multiple", 0), ("damping", 0.0)],
)
def test_settings_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        WidthSettings(**{field: value})


def test_kept_neurons_are_a_multiple() -> None:
    assert WidthSettings(keep=0.75, multiple=64).kept(1000) == 768
    assert WidthSettings(keep=0.01, multiple=8).kept(100) == 8
    assert WidthSettings(keep=0.99, multiple=64).kept(100) == 100


def correlated(tokens: int, width: int, seed: int) -> Tensor:
    """The Gram matrix of inputs most of which are mixtures of a few."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, width // 4, generator=generator)
    mixing = torch.randn(width // 4, width, generator=generator)
    inputs = causes @ mixing + 0.3 * torch.randn(tokens, width, generator=generator)
    return inputs.T @ inputs


def test_neurons_that_matter_stay_and_refit_makes_up_for_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    down, gram = torch.randn(24, 40, generator=generator), correlated(400, 40, 1)
    down *= torch.linspace(0.1, 1, 40)
    errors = []
    for kept in (torch.arange(20), keep_neurons(down, gram, 20)):
        assert len(kept) == 20 and bool((kept.diff() > 0).all())
        errors.append(column_error(down, refit_columns(down, gram, kept), gram, kept))
        assert errors[-1] < column_error(down, down[:, kept], gram, kept)
    assert errors[1] < 0.5 * errors[0]


def test_refit_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(8, 20, generator=generator)
    inputs = torch.randn(100, 20, generator=generator)
    kept = torch.arange(0, 20, 2)
    solved = refit_columns(down, inputs.T @ inputs, kept, 1e-9)
    expected = torch.linalg.lstsq(inputs[:, kept], inputs @ down.T).solution.T
    torch.testing.assert_close(solved, expected, atol=1e-4, rtol=1e-4)


def test_neurons_that_never_fire_go_first_and_bad_text_is_refused() -> None:
    gram = correlated(400, 40, 1)
    silent = torch.tensor([3, 7, 30])
    gram[silent] = 0
    gram[:, silent] = 0
    kept = keep_neurons(torch.randn(8, 40), gram, 37)
    assert not set(silent.tolist()) & set(kept.tolist())
    gram[0, 0] = float("nan")
    with pytest.raises(InputError, match="finite calibration activations"):
        refit_columns(torch.randn(8, 40), gram, torch.arange(37))


def test_removable_counts_empty_rows_and_columns() -> None:
    weight = torch.ones(6, 8)
    assert removable(weight) == (0, 0)
    weight[2] = 0
    weight[:, [1, 5]] = 0
    assert removable(weight) == (1, 2)
    assert removable(torch.zeros(3, 4)) == (3, 4)
    weight = torch.randn(64, 64)
    assert removable(weight * (torch.arange(64) % 4 < 2)) == (0, 32)
