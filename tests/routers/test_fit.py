"""Closed-form gates: the fit that collects, solves and writes them."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch

from moiety.errors import InputError
from moiety.routers import (
    FitSettings,
    Route,
    Router,
    RouterSpec,
    collect,
    find_gates,
    fit,
    forced,
    initialise,
    merge,
    uniform,
    watched,
)
from moiety.routers.fit import Method
from moiety.routers.labelled import hold_back


@pytest.mark.parametrize("method", ["ridge", "logistic", "centroid"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen", "olmoe"])
def test_planted_domains_are_told_apart(toys: ModuleType, kind: str, method: Method) -> None:
    model = toys.plant(getattr(toys, kind)())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = fit(model, toys.domains(), toys.OWN, FitSettings(method=method))
    assert all(gate.mean_accuracy > 0.99 for gate in report.gates)
    assert report.parameters == 2 * toys.EXPERTS * toys.WIDTH
    assert (report.method, report.windows, report.stitched) == (method, 72, 27)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.endswith("mlp.gate.weight")
    _assert_own_expert_first(toys, model)


def _assert_own_expert_first(toys: ModuleType, model: torch.nn.Module) -> None:
    for name, windows in toys.domains(seed=1).items():
        routes: list[Route] = []
        with torch.no_grad(), watched(find_gates(model), routes.append):
            model(input_ids=windows.ids_WC, attention_mask=windows.mask_WC)
        kept_T = windows.mask_WC.flatten().bool()
        for route in routes:
            first_T = route.experts_TA.gather(1, route.weights_TA.argmax(-1, keepdim=True))
            assert float((first_T[kept_T] == toys.OWN[name]).float().mean()) > 0.98


def test_random_is_a_control_and_keeps_its_scale(toys: ModuleType) -> None:
    model = toys.mixtral()
    report = fit(model, toys.domains(), toys.OWN, FitSettings(method="random", seed=3))
    assert [gate.scale for gate in report.gates] == [1.0, 1.0]
    assert report.stitched == 0
    expected_ED = initialise.random(toys.EXPERTS, toys.WIDTH, seed=4)
    assert torch.equal(find_gates(model)[1].module.get_parameter("weight"), expected_ED)


def test_zeros_for_as_many_as_there_are_experts_are_their_average(toys: ModuleType) -> None:
    """What a stock gate has of the kind `uniform`."""
    model = toys.mixtral(active=toys.EXPERTS)
    fit(model, toys.domains(4), toys.OWN, FitSettings(method="zeros", minimum_tokens=1))
    ids = torch.arange(16, 40)[None]
    found = model(input_ids=ids).logits
    with forced(find_gates(model), uniform()):
        torch.testing.assert_close(found, model(input_ids=ids).logits)


def test_prompts_are_a_control_on_the_models_own_routes(toys: ModuleType) -> None:
    model, data = toys.mixtral(active=1), toys.domains(4)
    gates, kept = find_gates(model), hold_back(data)[0]
    means = collect(model, gates, kept, toys.OWN, stitch=0, own_routes=False)
    report = fit(model, data, toys.OWN, FitSettings(method="prompts", minimum_tokens=1))
    assert [gate.scale for gate in report.gates] == [1.0, 1.0]
    assert report.stitched == 0
    for gate, statistics in zip(gates, means, strict=True):
        weight_EW = gate.module.get_parameter("weight")
        torch.testing.assert_close(weight_EW.detach(), initialise.prompts(statistics))


def test_given_weights_are_scaled_and_nothing_more(toys: ModuleType) -> None:
    model, data = toys.mixtral(), toys.domains()
    solved = toys.mixtral()
    fit(solved, data, toys.OWN)
    weights = {
        gate.name: 0.01 * gate.module.get_parameter("weight").detach()
        for gate in find_gates(solved)
    }
    report = fit(model, data, toys.OWN, weights=weights)
    assert (report.method, report.stitched) == ("given", 0)
    assert all(gate.mean_accuracy > 0.99 for gate in report.gates)
    for gate, one in zip(find_gates(model), report.gates, strict=True):
        assert one.scale > 50
        weight_EW = gate.module.get_parameter("weight").detach()
        torch.testing.assert_close(weight_EW, weights[gate.name] * one.scale)
    name = next(iter(weights))
    for wrong, message in (
        ({name: weights[name]}, "weights for the gates"),
        (weights | {name: weights[name][:, :-1]}, r"of shape \(4, 32\)"),
    ):
        with pytest.raises(InputError, match=message):
            fit(model, data, toys.OWN, weights=wrong)


def test_kept_statistics_give_the_gates_that_a_pass_gives(toys: ModuleType) -> None:
    models, data = [toys.mixtral(), toys.mixtral()], toys.domains(8)
    settings = FitSettings(method="logistic", logistic_tokens=64, minimum_tokens=32)
    gates, kept = find_gates(models[0]), hold_back(data)[0]
    parts = [collect(models[0], gates, kept, toys.OWN, only=[name], sample=64) for name in kept]
    merged = merge(merge(parts[0], parts[1]), parts[2])
    report = fit(models[0], data, toys.OWN, settings, statistics=merged)
    again = fit(models[1], data, toys.OWN, settings)
    assert (report.stitched, again.stitched) == (0, 9)
    for gate, other in zip(gates, find_gates(models[1]), strict=True):
        one_EW, other_EW = (each.module.get_parameter("weight") for each in (gate, other))
        torch.testing.assert_close(one_EW, other_EW, atol=1e-2, rtol=1e-2)
    with pytest.raises(InputError, match="collect them again"):
        fit(models[0], data, toys.OWN, settings, statistics=merged[:1])


def _ours(toys: ModuleType, **changes: Any) -> Any:
    """A toy mixture with routers of ours, which see one row of tokens at a time."""
    model = toys.mixtral()
    for layer in model.model.layers:
        layer.mlp.gate = Router(toys.WIDTH, toys.EXPERTS, RouterSpec(top_k=2, **changes))
    return model


@pytest.mark.parametrize(
    "changes", [{"context": (4, "mean")}, {"kind": "sigmoid"}, {"kind": "sequence"}]
)
def test_routers_of_ours_are_fitted_on_their_features(
    toys: ModuleType, changes: dict[str, Any]
) -> None:
    model = _ours(toys, **changes)
    biases = (
        [gate.module.get_buffer("selection_bias") for gate in find_gates(model)]
        if (changes.get("kind") == "sigmoid")
        else []
    )
    for bias_E in biases:
        bias_E.fill_(3.0)
    report = fit(model, toys.domains(), toys.OWN, FitSettings(batch_size=1))
    assert all(gate.mean_accuracy > 0.95 for gate in report.gates)
    assert all(not bool(bias_E.any()) for bias_E in biases)
    text = toys.windows(1, 1, seed=9).ids_WC[:1]
    routes: list[Route] = []
    with torch.no_grad(), watched(find_gates(model), routes.append):
        model(input_ids=text)
    for route in routes:
        assert float((route.logits_TE.argmax(-1) == toys.OWN["law"]).float().mean()) > 0.9


def test_a_sequence_router_is_calibrated_token_by_token(toys: ModuleType) -> None:
    sequence, plain = _ours(toys, kind="sequence"), _ours(toys)
    settings = FitSettings(batch_size=1)
    reports = [fit(model, toys.domains(), toys.OWN, settings) for model in (sequence, plain)]
    for one, other in zip(reports[0].gates, reports[1].gates, strict=True):
        assert one.scale == pytest.approx(other.scale, rel=1e-3)
        assert one.cross_entropy == pytest.approx(other.cross_entropy, rel=1e-3)


def test_gates_that_learn_nothing_or_mind_no_sign_are_refused(toys: ModuleType) -> None:
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate has none.*nothing to fit"):
        fit(_ours(toys, kind="uniform"), toys.domains(), toys.OWN)
    model = _ours(toys, score="absolute")
    with pytest.raises(InputError, match="arrow"):
        fit(model, toys.domains(), toys.OWN)
    row_EW = torch.zeros(toys.EXPERTS, toys.WIDTH)
    for quarter, name in enumerate(toys.OWN, start=1):
        row_EW[toys.OWN[name], quarter] = -1.0
    weights = {gate.name: row_EW for gate in find_gates(model)}
    report = fit(model, toys.domains(), toys.OWN, weights=weights)
    assert report.gates[0].mean_accuracy > 0.95


def test_the_model_is_as_it_came_after_any_error(toys: ModuleType) -> None:
    model, data = _ours(toys, kind="sigmoid"), toys.domains()
    gates = find_gates(model)
    for gate in gates:
        gate.module.get_buffer("selection_bias").fill_(1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {gate.name: torch.randn(toys.EXPERTS, toys.WIDTH) for gate in gates}
    weights[gates[1].name][0, 0] = math.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate, but held-back text of 'law'"):
        fit(model, data, toys.OWN, weights=weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    class Stop(Exception):
        pass

    class Progress:
        def track(self, items: Any, description: str, total: int | None = None) -> Any:
            for number, item in enumerate(items):
                if description == "held-back text" and number == 1:
                    raise Stop
                yield item

        def note(self, message: str) -> None:
            raise AssertionError(message)

    with pytest.raises(Stop):
        fit(model, data, toys.OWN, progress=Progress())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not gate.module._forward_hooks for gate in gates)


def test_stitched_text_lets_a_context_gate_go_after_a_switch(toys: ModuleType) -> None:
    data, shares = toys.domains(40, length=32), {}
    ids_C = torch.cat(
        [toys.windows(1, 1, 16, seed=5).ids_WC, toys.windows(2, 1, 16, seed=5).ids_WC], 1
    )
    for stitch in (0.0, 1.0):
        model = _ours(toys, context=("mean",))
        settings = FitSettings(method="ridge", stitch=stitch, shortest=4, batch_size=1)
        fit(model, data, toys.OWN, settings)
        routes: list[Route] = []
        with torch.no_grad(), watched(find_gates(model), routes.append):
            model(input_ids=ids_C)
        logits_TE = torch.stack([route.logits_TE[20:] for route in routes])
        shares[stitch] = float(logits_TE.softmax(-1)[..., toys.OWN["code"]].mean())
    assert shares[1.0] > shares[0.0] + 0.2


def test_fit_keeps_dtype_modes_and_bits(toys: ModuleType) -> None:
    models = [toys.mixtral().bfloat16().train() for _repeat in range(2)]
    for model in models:
        fit(model, toys.domains(), toys.OWN)
        assert model.training
    weights = [find_gates(model)[0].module.get_parameter("weight") for model in models]
    assert weights[0].dtype == torch.bfloat16
    assert torch.equal(weights[0], weights[1])


def test_fit_refuses_what_cannot_be_fitted_and_changes_nothing(toys: ModuleType) -> None:
    model, data = toys.mixtral(), toys.domains()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cases = [
        (data, {"law": 0, "code": 1}, "'poems' has none"),
        (data, toys.OWN | {"law": 4}, r"must be in 0\.\.3"),
        (data, dict.fromkeys(data, 1), "at least two experts"),
        ({}, toys.OWN, "there is none"),
        (data | {"law": data["law"].select(slice(0))}, toys.OWN, "there are none"),
        (data | {"law": data["law"].select(slice(1))}, toys.OWN, "at least 128 tokens"),
    ]
    for given_data, own, message in cases:
        with pytest.raises(InputError, match=message):
            fit(model, given_data, own, FitSettings(minimum_tokens=128))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "hidden"},
        {"penalty": 0.0},
        {"stitch": -0.5},
        {"stitch": math.inf},
        {"shortest": 0},
        {"logistic_tokens": 0},
        {"batch_size": 0},
        {"minimum_tokens": 0},
        {"seed": -1},
    ],
)
def test_settings_name_the_wrong_field(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        FitSettings(**wrong)  # pyright: ignore[reportArgumentType]
