"""Routed models with adapters on top and device maps: what works, and that the rest is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from moiety.compose import build
from moiety.compose.routed.modules import RoutedLinear
from moiety.routers import find_gates, forced, one_hot

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
IDS = torch.arange(3, 43).reshape(2, 20)
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def built(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FFNs are routed, attention is one for all."""
    folder = tmp_path_factory.mktemp("routed")
    return made(world, folder)


def made(world: Any, folder: Path, **compose: Any) -> Path:
    """A routed composite of FFNs, pruned the quick way."""
    changes = {
        "compose": {"kind": "routed", "shared": "base", **compose},
        "prune": {"method": "magnitude", "refit_steps": 0, "sites": "ffn"},
        "route": {"train_steps": 0},
    }
    build(world.write_recipe(folder / "recipe.yaml", **changes), folder / "out", check=False)
    return folder / "out"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def opened(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def adapted(folder: Path, targets: Any) -> Any:
    settings: Any = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)
    return get_peft_model(opened(folder), settings)


def test_lora_learns_on_linears_that_are_not_routed(built: Path, tmp_path: Path) -> None:
    before = logits(opened(built))
    model = adapted(built, ATTENTION)
    torch.testing.assert_close(logits(model), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(opened(built), str(tmp_path))
    torch.testing.assert_close(logits(again), logits(model))
    assert not torch.allclose(logits(again), before, atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(again), rtol=1e-4, atol=1e-5)


def test_gates_are_found_and_forced_through_an_adapter(built: Path) -> None:
    model, plain = adapted(built, ATTENTION), opened(built)
    gates = find_gates(model)
    assert len(gates) == len(find_gates(plain)) == 2
    routes = []
    for expert in range(3):
        with forced(gates, one_hot(expert)), forced(find_gates(plain), one_hot(expert)):
            routes.append(logits(model))
            torch.testing.assert_close(routes[-1], logits(plain))
    assert not torch.allclose(routes[0], routes[1], atol=1e-4)


@pytest.mark.parametrize("target", ["up_proj", "router"])
def test_peft_refuses_what_is_routed_and_says_so(built: Path, target: str) -> None:
    name = {"up_proj": "RoutedLinear", "router": "Router"}[target]
    with pytest.raises(ValueError, match=rf"Target module {name}\(.*is not supported"):
        adapted(built, [target])


def test_all_linear_takes_the_linears_that_are_left(built: Path) -> None:
    model = adapted(built, "all-linear")
    taken = {name.rpartition(".")[2] for name in model.targeted_module_names}
    assert taken == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert sum(isinstance(module, RoutedLinear) for module in model.modules()) == 2 * 3


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_changes_nothing(built: Path, device_map: Any) -> None:
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("auto would choose the GPU, whose kernels round otherwise")
    model = opened(built, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model), logits(opened(built)))
    mask = torch.ones_like(IDS)
    written = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert written.shape[0] == 2 and written.shape[1] <= 24


@pytest.mark.parametrize("norms", ["shared", "routed"])
def test_blocks_on_disk_change_nothing(world: Any, tmp_path: Path, norms: str) -> None:
    built = made(world, tmp_path, norms=norms)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = opened(built, device_map=places, offload_folder=tmp_path / "disk")
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(logits(model), logits(opened(built)))
