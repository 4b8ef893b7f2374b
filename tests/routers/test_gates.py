"""Gates: found in stock models, watched and forced."""

from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moiety.errors import InputError
from moiety.routers import Route, find_gates, forced, one_hot, random, uniform, watched
from moiety.routers.passes import linear_gates


@pytest.mark.parametrize("kind", ["mixtral", "qwen", "olmoe"])
def test_gates_of_stock_models_are_found_in_layer_order(toys: ModuleType, kind: str) -> None:
    gates = find_gates(getattr(toys, kind)())
    assert [gate.layer for gate in gates] == [0, 1]
    assert [gate.name for gate in gates] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert {(gate.experts, gate.active) for gate in gates} == {(4, 2)}


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(InputError, match="LlamaForCausalLM has no gates"):
        find_gates(LlamaForCausalLM(config))


def test_a_gate_without_a_matrix_is_refused() -> None:
    block = nn.Module()
    block.gate, block.experts = nn.Identity(), nn.Identity()
    model = nn.Module()
    model.block = block
    with pytest.raises(InputError, match=r"block\.gate"):
        find_gates(model)


def test_a_gate_with_a_bias_is_not_linear(toys: ModuleType) -> None:
    model = toys.mixtral()
    find_gates(model)[1].module.register_parameter("bias", nn.Parameter(torch.zeros(4)))
    with pytest.raises(InputError, match=r"layers\.1.*bias"):
        linear_gates(model)


def _routes(model: nn.Module, ids_WC: torch.Tensor) -> list[Route]:
    routes: list[Route] = []
    with torch.no_grad(), watched(find_gates(model), routes.append):
        model(input_ids=ids_WC)
    return routes


@pytest.mark.parametrize("kind", ["mixtral", "qwen", "olmoe"])
def test_watched_gives_the_true_gate_inputs(toys: ModuleType, kind: str) -> None:
    model = getattr(toys, kind)().eval()
    ids_WC = toys.windows(1, 3).ids_WC
    routes = _routes(model, ids_WC)
    for gate, route in zip(find_gates(model), routes, strict=True):
        assert route.layer == gate.layer
        assert route.hidden_TD.shape == (ids_WC.numel(), toys.WIDTH)
        weight_ED = gate.module.get_parameter("weight")
        torch.testing.assert_close(route.logits_TE, route.hidden_TD @ weight_ED.T)
        order_TA = route.logits_TE.topk(2).indices
        assert torch.equal(route.experts_TA.sort().values, order_TA.sort().values)


def test_forced_overrides_and_leaves_no_trace(toys: ModuleType) -> None:
    model, ids_WC = toys.mixtral(), toys.windows(1, 2).ids_WC
    before = model(input_ids=ids_WC).logits
    with forced(find_gates(model), one_hot(3)):
        routes = _routes(model, ids_WC)
        inside = model(input_ids=ids_WC).logits
    assert all(bool((route.experts_TA == 3).all()) for route in routes)
    assert not torch.equal(before, inside)
    assert torch.equal(before, model(input_ids=ids_WC).logits)


def test_the_inner_of_two_forced_blocks_decides(toys: ModuleType) -> None:
    model, ids_WC = toys.mixtral(), toys.windows(1, 2).ids_WC
    gates = find_gates(model)
    with forced(gates, one_hot(1)):
        with forced(gates[:1], one_hot(2)):
            inner = _routes(model, ids_WC)
        outer = _routes(model, ids_WC)
    assert [int(route.experts_TA.unique()) for route in inner] == [2, 1]
    assert [int(route.experts_TA.unique()) for route in outer] == [1, 1]


def test_a_watcher_around_forced_sees_what_the_gate_wanted(toys: ModuleType) -> None:
    model, ids_WC = toys.mixtral(layers=1), toys.windows(1, 2).ids_WC
    gates = find_gates(model)
    wanted: list[Route] = []
    with watched(gates, wanted.append), forced(gates, one_hot(1)), torch.no_grad():
        model(input_ids=ids_WC)
    assert torch.equal(wanted[0].experts_TA, _routes(model, ids_WC)[0].experts_TA)


def test_hooks_go_even_after_an_error(toys: ModuleType) -> None:
    gates = find_gates(toys.mixtral())
    with pytest.raises(RuntimeError), forced(gates, uniform()), watched(gates, print):
        raise RuntimeError
    assert all(not gate.module._forward_hooks for gate in gates)


def test_one_hot_equals_the_model_with_one_expert_only(toys: ModuleType) -> None:
    model, ids_WC = toys.mixtral(), toys.windows(1, 2).ids_WC
    twin = toys.mixtral()
    for layer in twin.model.layers:
        for weight in layer.mlp.experts.parameters():
            weight.data.copy_(weight.data[1].expand_as(weight))
    with forced(find_gates(model), one_hot(1)):
        torch.testing.assert_close(
            model(input_ids=ids_WC).logits, twin(input_ids=ids_WC).logits, atol=1e-5, rtol=1e-5
        )


def test_policies_give_weights_that_sum_to_one(toys: ModuleType) -> None:
    gate, logits_TE = find_gates(toys.mixtral())[0], torch.randn(50, 4)
    for policy, routes in [(one_hot(2), 1), (uniform(), 4), (random(0), 2)]:
        weights_TA, experts_TA = policy(gate, logits_TE)
        assert weights_TA.shape == experts_TA.shape == (50, routes)
        torch.testing.assert_close(weights_TA.sum(-1), torch.ones(50))
        assert all(len(set(row)) == routes for row in experts_TA.tolist())


def test_random_is_seeded_and_reaches_every_expert(toys: ModuleType) -> None:
    gate, logits_TE = find_gates(toys.mixtral())[0], torch.randn(50, 4)
    first, again, other = (random(seed)(gate, logits_TE)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.flatten().tolist()) == {0, 1, 2, 3}


def test_one_hot_refuses_an_expert_that_is_not_there(toys: ModuleType) -> None:
    with pytest.raises(InputError, match=r"0\.\.3, but it is 4"):
        one_hot(4)(find_gates(toys.mixtral())[0], torch.randn(2, 4))
