"""Models that route nothing: one row, their bytes, any domain names."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from moiety.analysis import evaluate
from moiety.analysis.tables import controls_table, resources_table
from moiety.compose.opening import open_any
from moiety.errors import InputError
from moiety.experts import PruneSettings, open_delta, prune
from moiety.experts.delta import merge_delta
from moiety.scoring import score
from moiety.text import read_documents, token_windows

SETTINGS = PruneSettings(method="magnitude", refit_steps=0, context_length=32, windows=4)


@pytest.fixture(scope="module")
def folders(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A packed finetune, its task vector, and that one merged into its base."""
    folder = tmp_path_factory.mktemp("alone")
    text = world.texts["letters"]["calibration"]
    finetune = world.finetunes["letters"]
    prune(finetune, folder / "packed", text, SETTINGS)
    prune(finetune, folder / "vector", text, SETTINGS, base=world.base)
    merge_delta(folder / "vector", folder / "merged")
    return {name: folder / name for name in ("packed", "vector", "merged")}


def test_the_one_row_is_the_plain_loss(world: Any, folders: dict[str, Path]) -> None:
    held = {"anything": world.texts["letters"]["heldout"]}
    models = {
        "packed": AutoModelForCausalLM.from_pretrained(folders["packed"]),
        "vector": open_delta(folders["vector"]),
        "merged": LlamaForCausalLM.from_pretrained(folders["merged"]),
    }
    windows = token_windows(world.tokenizer, read_documents(held["anything"]), 32, 6)
    losses = {}
    for name, folder in folders.items():
        results = evaluate(folder, held, context_length=32, windows=6)
        plain = score(models[name], windows)
        assert results["loss"] == {"model": {"anything": pytest.approx(plain.loss, rel=1e-6)}}
        bits = {"model": {"anything": pytest.approx(plain.bits_per_byte, rel=1e-6)}}
        assert results["bits_per_byte"] == bits
        assert results["tokens_per_second"]["model"].keys() == {"prefill", "decode"}
        assert results["context_length"] == 32 and results["device"]
        assert controls_table(results).rows[0][0] == "model"
        assert resources_table(results).rows
        losses[name] = plain.loss
    assert losses["vector"] == pytest.approx(losses["merged"], rel=1e-4)
    assert losses["vector"] != pytest.approx(losses["packed"], rel=1e-4)


def test_bytes_of_packed_and_of_dense_models(world: Any, folders: dict[str, Path]) -> None:
    held = {"anything": world.texts["letters"]["heldout"]}
    sizes = {
        name: evaluate(folder, held, context_length=32, windows=1)["bytes"]
        for name, folder in {**folders, "base": world.base}.items()
    }
    dense = sum(p.nbytes for p in LlamaForCausalLM.from_pretrained(world.base).parameters())
    assert sizes["base"] == sizes["merged"] == {"model": dense}
    assert sizes["vector"]["dense_model"] == dense < sizes["vector"]["model"]
    packed = AutoModelForCausalLM.from_pretrained(folders["packed"], dtype="auto")
    stored = sum(tensor.nbytes for tensor in packed.state_dict().values())
    tied = packed.get_parameter("model.embed_tokens.weight").nbytes
    assert sizes["packed"]["model"] >= stored - tied
    assert sizes["packed"]["model"] < sizes["packed"]["dense_model"]


def test_open_any_knows_what_routes(world: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    for folder in (*folders.values(), world.base):
        assert open_any(folder).experts == ()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="expected weights in"):
        open_any(tmp_path)
