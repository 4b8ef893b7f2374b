"""Layers that stay dense in a packed model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import AutoModelForCausalLM

from moiety.experts import dense, kernels
from moiety.experts.dense import DenseLinear, read_fast
from moiety.experts.kernels import crossover
from moiety.experts.modules import SparseLinear


class Calls:
    """Counts the products that are not torch's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(crossover, "SMALLEST_DENSE", 1)
        product = kernels.dense_linear

        def counted(*arguments: Any) -> torch.Tensor:
            self.count += 1
            return product(*arguments)

        monkeypatch.setattr(kernels, "dense_linear", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def test_plain_layers_are_read_fast_and_stay_what_they_were(calls: Calls) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8, bias=False))
    input = torch.randn(2, 1, 40)
    expected, names = model(input), list(model.state_dict())
    read_fast(model)
    assert [type(layer) for layer in model] == [DenseLinear, nn.ReLU, DenseLinear]
    assert list(model.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(model(input), expected, rtol=1e-5, atol=1e-5)
    assert calls.count == (2 if kernels.reads_faster(input, torch.empty(24, 40)) else 0)


def test_what_is_not_a_plain_matrix_is_left_to_torch(calls: Calls) -> None:
    weight, input = torch.randn(24, 40), torch.randn(1, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dense.linear(input, weight).dtype == torch.bfloat16
    assert dense.linear(input.to("meta"), weight.to("meta")).is_meta
    with FakeTensorMode() as fake:
        given = fake.from_tensor(input), fake.from_tensor(weight)
        assert dense.linear(*given).shape == (1, 24)
    with torch.no_grad(), pytest.raises(RuntimeError):
        dense.linear(input, weight, torch.randn(24).bfloat16())
    compiled = torch.compile(dense.linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input, weight), functional.linear(input, weight))
    wide = dense.linear(input.double(), weight.double())
    torch.testing.assert_close(wide, functional.linear(input.double(), weight.double()))
    with pytest.raises(RuntimeError):
        dense.linear(input.bfloat16(), weight)
    assert calls.count == 0


def test_gradients_reach_weight_bias_and_input(calls: Calls) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1024, 1100)
    input = torch.randn(1, 1024, requires_grad=True)
    leaves = (input, layer.weight, layer.bias)
    expected = torch.autograd.grad(layer(input).sin().sum(), leaves)
    read_fast(layer)
    found = torch.autograd.grad(layer(input).sin().sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    jacobian = torch.func.jacrev(layer)(input.detach())
    assert jacobian.shape == (1, 1100, 1, 1024) and calls.count == 0


def test_an_opened_model_reads_its_head_so(packs: Any, tmp_path: Path, calls: Calls) -> None:
    packed = packs.write_packed(
        packs.tiny_mixtral(), tmp_path, ["model.layers.0.self_attn.q_proj"], "2:4", "bf16"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(packed)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {DenseLinear}
    assert any(isinstance(module, SparseLinear) for module in model.modules())
    before = calls.count
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1]]))
    assert (calls.count > before) == kernels.reads_faster(torch.empty(1, 8), torch.empty(8, 8))
    saved = tmp_path / "again"
    model.save_pretrained(saved)
    again: Any = AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([[3, 1, 2]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
