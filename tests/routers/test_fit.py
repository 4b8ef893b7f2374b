"""Closed-form gates: statistics, solutions, and the fit that writes them."""

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moiety.errors import InputError
from moiety.routers import (
    FitSettings,
    GateStatistics,
    Route,
    collect,
    find_gates,
    fit,
    forced,
    initialise,
    merge,
    one_hot,
    watched,
)
from moiety.routers.fit import Method


def _statistics(hidden_TD: torch.Tensor, label_T: torch.Tensor, experts: int) -> GateStatistics:
    count_E = label_T.bincount(minlength=experts)
    weight_T = 1 / count_E[label_T]
    target_TE = torch.nn.functional.one_hot(label_T, experts).float()
    return GateStatistics(
        name="gate",
        layer=0,
        gram_DD=(hidden_TD * weight_T[:, None]).T @ hidden_TD,
        sum_ED=(target_TE * weight_T[:, None]).T @ hidden_TD,
        count_E=count_E,
    )


def _planted(seed: int, tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label_T = torch.cat([torch.arange(3), torch.randint(0, 3, (tokens,), generator=generator)])
    hidden_TD = torch.randn(len(label_T), 7, generator=generator) * 0.1
    hidden_TD[torch.arange(len(label_T)), label_T] += 1
    return hidden_TD, label_T


def _centred(weight_ED: torch.Tensor) -> torch.Tensor:
    return weight_ED - weight_ED.mean(0)


@given(st.integers(0, 50))
def test_ridge_is_weighted_least_squares(seed: int) -> None:
    hidden_TD, label_T = _planted(seed)
    statistics, penalty = _statistics(hidden_TD, label_T, 3), 0.1
    root_T1 = (1 / label_T.bincount()[label_T]).sqrt()[:, None]
    ridge = math.sqrt(penalty * float(statistics.gram_DD.diagonal().mean()))
    rows = torch.cat([hidden_TD * root_T1, ridge * torch.eye(7)])
    targets = torch.cat([torch.nn.functional.one_hot(label_T, 3) * root_T1, torch.zeros(7, 3)])
    expected_DE = torch.linalg.lstsq(rows, targets).solution
    weight_ED = initialise.ridge(statistics, penalty)
    torch.testing.assert_close(weight_ED, _centred(expected_DE.T), atol=1e-4, rtol=1e-3)


@given(st.permutations(range(3)))
def test_permuting_experts_permutes_rows(order: list[int]) -> None:
    hidden_TD, label_T = _planted(0)
    renamed_T = torch.tensor(order)[label_T]
    for solve in (initialise.ridge, initialise.centroid):
        plain_ED = solve(_statistics(hidden_TD, label_T, 3))
        renamed_ED = solve(_statistics(hidden_TD, renamed_T, 3))
        torch.testing.assert_close(renamed_ED[order], plain_ED, atol=1e-5, rtol=1e-4)


def test_labels_weigh_the_same_however_many_tokens_they_have() -> None:
    hidden_TD, label_T = _planted(1)
    often_TD = torch.cat([hidden_TD, hidden_TD[label_T == 1].repeat(9, 1)])
    often_T = torch.cat([label_T, label_T[label_T == 1].repeat(9)])
    for solve in (initialise.ridge, initialise.centroid):
        plain_ED, often_ED = (
            solve(_statistics(*pair, 3)) for pair in ((hidden_TD, label_T), (often_TD, often_T))
        )
        torch.testing.assert_close(plain_ED, often_ED, atol=1e-5, rtol=1e-4)


def test_centroid_is_the_nearest_mean_by_cosine() -> None:
    hidden_TD, label_T = _planted(2)
    mean_ED = torch.stack([hidden_TD[label_T == label].mean(0) for label in range(3)])
    cosine_TE = torch.cosine_similarity(hidden_TD[:, None], mean_ED[None], dim=-1)
    logits_TE = hidden_TD @ initialise.centroid(_statistics(hidden_TD, label_T, 3)).T
    assert torch.equal(logits_TE.argmax(-1), cosine_TE.argmax(-1))


def test_random_is_seeded_and_of_the_stock_size() -> None:
    weight_ED = initialise.random(8, 500, seed=1)
    assert torch.equal(weight_ED, initialise.random(8, 500, seed=1))
    assert float(weight_ED.std()) == pytest.approx(0.02, rel=0.05)


def test_best_scale_is_a_minimum_and_is_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    label_T = torch.arange(300) % 3
    logits_TE = torch.nn.functional.one_hot(label_T, 3) + torch.randn(300, 3, generator=generator)
    scale = initialise.best_scale(logits_TE, label_T)
    best = initialise.label_loss(logits_TE, label_T, scale)
    assert all(best < initialise.label_loss(logits_TE, label_T, scale * off) for off in (0.8, 1.25))
    assert initialise.best_scale(10 * logits_TE, label_T) == pytest.approx(scale / 10, rel=1e-3)
    separable_TE = torch.nn.functional.one_hot(label_T, 3).float()
    assert math.isfinite(initialise.best_scale(separable_TE, label_T))
    assert initialise.best_scale(torch.ones(300, 3), label_T) == 1.0


def test_statistics_are_those_of_the_unpadded_gate_inputs(toys: ModuleType) -> None:
    model, data = toys.mixtral(), toys.domains(5)
    gates = find_gates(model)
    hidden: list[list[torch.Tensor]] = [[], []]
    labels = []
    for name, windows in data.items():
        mask_T = windows.mask_WC.flatten().bool()

        def listen(route: Route, kept_T: torch.Tensor = mask_T) -> None:
            hidden[route.layer].append(route.hidden_TD[kept_T])

        labels += [toys.OWN[name]] * int(windows.mask_WC.sum())
        with torch.no_grad(), forced(gates, one_hot(toys.OWN[name])), watched(gates, listen):
            model(input_ids=windows.ids_WC, attention_mask=windows.mask_WC)
    for got, pieces in zip(
        collect(model, gates, data, toys.OWN, batch_size=2), hidden, strict=True
    ):
        expected = _statistics(torch.cat(pieces), torch.tensor(labels), 4)
        torch.testing.assert_close(got.gram_DD, expected.gram_DD, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.sum_ED, expected.sum_ED, atol=1e-4, rtol=1e-4)
        assert torch.equal(got.count_E, expected.count_E)


def test_adding_a_domain_is_a_merge(toys: ModuleType) -> None:
    model, data = toys.mixtral(), toys.domains(5)
    gates = find_gates(model)
    whole = collect(model, gates, data, toys.OWN)
    poems = {"poems": data.pop("poems")}
    parts = merge(collect(model, gates, data, toys.OWN), collect(model, gates, poems, toys.OWN))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.gram_DD, other.gram_DD)
        torch.testing.assert_close(one.sum_ED, other.sum_ED)
        assert torch.equal(one.count_E, other.count_E)
    with pytest.raises(InputError, match="both hold text of expert 3"):
        merge(whole, collect(model, gates, poems, toys.OWN))
    with pytest.raises(InputError, match="same gates"):
        merge(whole, whole[:1])


def test_nan_activations_name_the_gate_and_the_domain(toys: ModuleType) -> None:
    model = toys.mixtral()
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate, but text of 'law'"):
        collect(model, find_gates(model), toys.domains(2), toys.OWN)


@pytest.mark.parametrize("method", ["ridge", "centroid"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen", "olmoe"])
def test_planted_domains_are_told_apart(toys: ModuleType, kind: str, method: Method) -> None:
    model = toys.plant(getattr(toys, kind)())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = fit(model, toys.domains(), toys.OWN, FitSettings(method=method))
    assert all(gate.mean_accuracy > 0.99 for gate in report.gates)
    assert report.parameters == 2 * toys.EXPERTS * toys.WIDTH
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
    expected_ED = initialise.random(toys.EXPERTS, toys.WIDTH, seed=4)
    assert torch.equal(find_gates(model)[1].module.get_parameter("weight"), expected_ED)


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
    "wrong", [{"method": "hidden"}, {"penalty": 0.0}, {"batch_size": 0}, {"minimum_tokens": 0}]
)
def test_settings_name_the_wrong_field(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        FitSettings(**wrong)  # pyright: ignore[reportArgumentType]
