"""Mixtures and packed merges, stock classes with packed weights, at home in transformers and PEFT.

Routed models and ensembles have files of their own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from moiety.compose import Recipe, build

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
IDS = torch.arange(3, 43).reshape(2, 20)
MASK = torch.ones_like(IDS)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
KINDS = {
    "mixture": {"kind": "mixture", "shared": "base"},
    "merge": {"kind": "merge", "sparse": "reprune", "parameters": {"weight": 0.4}},
}


@pytest.fixture(scope="module")
def folders(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("living")
    prune = {"method": "magnitude", "refit_steps": 0, "sites": "ffn"}
    quick = {"prune": prune, "route": {"train_steps": 0}}
    for kind, compose in KINDS.items():
        recipe = Recipe.model_validate(world.recipe(compose=compose, **quick))
        build(recipe, folder / kind, work=folder / "stages", check=False)
    return {kind: folder / kind for kind in KINDS}


def opened(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_same_however_it_is_run(folders: dict[str, Path], kind: str) -> None:
    model = opened(folders[kind])
    plain = model.generate(IDS, attention_mask=MASK, **GREEDY)
    padded = torch.cat([torch.full((2, 3), 2), IDS], 1)
    padding = torch.cat([torch.zeros(2, 3, dtype=torch.long), MASK], 1)
    for how in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        again = model.generate(IDS, attention_mask=MASK, **GREEDY, **how)
        assert torch.equal(again, plain), how
        left = model.generate(padded, attention_mask=padding, **GREEDY, **how)
        assert torch.equal(left[:, 23:], plain[:, 20:]), how
    beams = {**GREEDY, "num_beams": 3}
    cached = model.generate(IDS, attention_mask=MASK, **beams)
    assert torch.equal(cached, model.generate(IDS, attention_mask=MASK, use_cache=False, **beams))


@pytest.mark.filterwarnings("ignore:Passing `generation_config`")
def test_a_merge_drafts_for_a_mixture(folders: dict[str, Path]) -> None:
    target, draft = opened(folders["mixture"]), opened(folders["merge"])
    plain = target.generate(IDS[:1], attention_mask=MASK[:1], **GREEDY)
    helped = target.generate(IDS[:1], attention_mask=MASK[:1], assistant_model=draft, **GREEDY)
    assert torch.equal(plain, helped)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_half_precision_and_device_map(folders: dict[str, Path], kind: str) -> None:
    model = opened(folders[kind])
    with torch.no_grad():
        logits = model(IDS).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)(IDS).logits
        torch.testing.assert_close(compiled, logits)
        assert torch.equal(opened(folders[kind], device_map="cpu")(IDS).logits, logits)
        for dtype in (torch.bfloat16, torch.float16):
            half = opened(folders[kind], dtype)(IDS).logits
            assert half.dtype == dtype
            assert (half - logits).abs().max() < 0.05 * logits.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_lora_learns_on_top_and_comes_off(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    plain, adapted = opened(folders[kind]), get_peft_model(opened(folders[kind]), settings)
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=1.0)
    losses = []
    for _ in range(3):
        losses.append(adapted(input_ids=IDS, labels=IDS).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    adapted.save_pretrained(str(tmp_path))
    again: Any = PeftModel.from_pretrained(opened(folders[kind]), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, adapted.eval()(IDS).logits)
        with adapted.disable_adapter():
            assert torch.equal(adapted(IDS).logits, plain(IDS).logits)
