"""Modules that hold tiles: saved, moved, copied and converted as if they held what is stored."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moiety.experts.kernels.weights import DTYPES, INTEGERS
from moiety.experts.modules import PackedModule, SparseExperts, SparseLinear
from moiety.experts.pattern import Pattern

pytestmark = pytest.mark.usefixtures("compiled", "seeded")
IDS = torch.arange(3, 43).reshape(2, 20)
MODULES = ("mlp.experts", "self_attn.q_proj")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def opened(packs: Any, folder: Path, values: str) -> Any:
    """A Mixtral of packed experts and queries, as any user opens it."""
    modules = [f"model.layers.{layer}.{name}" for layer in range(2) for name in MODULES]
    model: Any = AutoModelForCausalLM.from_pretrained(
        packs.write_packed(packs.tiny_mixtral(), folder, modules, "2:4", values)
    )
    sparse = [module for module in model.modules() if isinstance(module, PackedModule)]
    assert {type(module) for module in sparse} == {SparseExperts, SparseLinear}
    assert all(name.endswith("_tiles") for module in sparse for name, _ in module.named_buffers())
    assert not any(list(module.parameters()) for module in sparse)
    return model


def a_linear(packs: Any, rows: int, columns: int, values: str) -> tuple[Tensor, SparseLinear]:
    """A tiled layer, and the same dense in fp64."""
    dense, packed = packs.packed(rows, columns, "2:4", values)
    linear = SparseLinear(columns, rows, Pattern.parse("2:4"), values)
    linear.load_state_dict(packed.tensors("weight"))
    linear.prepare()
    return dense.double(), linear


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("values", DTYPES)
def test_tiles_are_saved_as_they_came(packs: Any, tmp_path: Path, values: str) -> None:
    model = opened(packs, tmp_path, values)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[n], stored[n]) for n in stored if "q_proj" in n)
    model.save_pretrained(tmp_path / "again")
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), stored)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("values", ["bf16", "int4"])
def test_tiled_models_are_moved_copied_and_shared(packs: Any, tmp_path: Path, values: str) -> None:
    model = opened(packs, tmp_path, values)
    before, state = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    assert torch.equal(logits(copy.deepcopy(model)), before)
    assert torch.equal(logits(copy.deepcopy(model).share_memory()), before)
    assert torch.equal(logits(copy.deepcopy(model).to("cpu")), before)
    other = copy.deepcopy(model)
    assert_same(other.state_dict(), state)
    changed = {n: t.flip(0) if t.is_floating_point() else t for n, t in state.items()}
    other.load_state_dict(changed)
    assert_same(other.state_dict(), changed)
    assert not torch.equal(logits(other), before)
    other.load_state_dict(state)
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize("values", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tiles_follow_a_change_of_dtype(packs: Any, values: str, dtype: torch.dtype) -> None:
    dense, linear = a_linear(packs, 20, 36, values)
    linear.to(dtype)
    assert "weight_tiles" in dict(linear.named_buffers())
    kind = values if values in INTEGERS else next(k for k, d in DTYPES.items() if d == dtype)
    assert linear.state_dict()["weight"].dtype == DTYPES[kind]
    input = torch.randn(5, 36).to(dtype)
    expected = input.double() @ dense.T
    torch.testing.assert_close(linear(input).double(), expected, rtol=0.02, atol=0.02)


def test_a_tiled_model_generates_what_its_dense_export_does(packs: Any, tmp_path: Path) -> None:
    model = opened(packs, tmp_path, "fp32")
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    mask = torch.ones_like(IDS)
    ours, theirs = (
        one.generate(IDS, attention_mask=mask, max_new_tokens=16, do_sample=False)
        for one in (model, dense)
    )
    assert torch.equal(ours, theirs)


def test_tiles_take_seven_sixteenths_of_bf16_and_what_is_stored_nine(packs: Any) -> None:
    _, linear = a_linear(packs, 256, 2048, "bf16")
    tiles, stored = linear.packed_bytes, linear.stored_bytes
    linear.untile()
    dense = nn.Linear(2048, 256, bias=False, dtype=torch.bfloat16).weight.nbytes
    assert tiles == pytest.approx(dense * 7 / 16, rel=0.04)
    assert linear.packed_bytes == linear.stored_bytes == stored == dense * 9 // 16
