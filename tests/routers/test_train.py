"""Gate training: what moves, what stays, what is kept, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from moiety.errors import InputError
from moiety.progress import Silent
from moiety.routers import Router, TrainReport, TrainSettings, find_gates, fit, train
from moiety.routers.objective import check_objective
from moiety.routers.sampling import SWITCHING
from moiety.routers.spec import RouterSpec

FAST = TrainSettings(steps=6, eval_every=2, learning_rate=1e-2, batch_size=4)


def _train(toys: ModuleType, model: nn.Module, settings: TrainSettings = FAST) -> TrainReport:
    return train(model, toys.domains(5), toys.domains(3, seed=1), toys.OWN, settings)


def _gates(model: nn.Module) -> list[torch.Tensor]:
    return [gate.module.get_parameter("weight").detach().clone() for gate in find_gates(model)]


def _only(objective: Any) -> TrainSettings:
    return dataclasses.replace(
        FAST, objective=objective, domain_weight=0, balance="none", z_weight=0, learning_rate=3e-2
    )


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["mixtral", "qwen", "olmoe"])
def test_only_gates_move_and_every_flag_comes_back(toys: ModuleType, kind: str) -> None:
    model = toys.plant(getattr(toys, kind)()).train()
    model.model.norm.weight.requires_grad_(False)
    flags = {name: one.requires_grad for name, one in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = _train(toys, model)
    assert report.best_loss < report.start_loss
    assert report.parameters == 2 * toys.EXPERTS * toys.WIDTH
    assert report.trained == tuple(name for name in before if name.endswith("mlp.gate.weight"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in report.trained)
    assert {name: one.requires_grad for name, one in model.named_parameters()} == flags
    assert all(one.grad is None for one in model.parameters())
    assert model.training


def test_language_loss_alone_reaches_every_gate(toys: ModuleType) -> None:
    model = toys.mixtral()
    before = _gates(model)
    only = dataclasses.replace(
        FAST, domain_weight=0, balance_weight=0, z_weight=0, learning_rate=1e-3
    )
    report = _train(toys, model, only)
    assert report.best_loss < report.start_loss
    assert not any(
        torch.equal(one, other) for one, other in zip(before, _gates(model), strict=True)
    )


def test_domain_loss_raises_the_own_share(toys: ModuleType) -> None:
    report = _train(toys, toys.mixtral(active=1), dataclasses.replace(FAST, domain_weight=1))
    assert report.history[-1].own_share > report.history[0].own_share + 0.2
    assert set(report.history[0].domain_losses) == {*toys.OWN, SWITCHING}
    assert set(report.oracle_losses) == {*toys.OWN, SWITCHING}


@pytest.mark.parametrize("objective", ["domain", "regret"])
def test_objectives_that_teach_a_gate_that_chooses_one_expert(
    toys: ModuleType, objective: str
) -> None:
    model = toys.mixtral(active=1)
    report = _train(toys, model, _only(objective))
    assert report.objective == objective
    assert report.best_regret < report.start_regret / 2
    assert report.history[-1].own_share > report.history[0].own_share + 0.2
    assert report.best_loss == min(evaluation.loss for evaluation in report.history)


def test_distillation_comes_near_the_own_experts(toys: ModuleType) -> None:
    report = _train(toys, toys.mixtral(), dataclasses.replace(_only("distill"), steps=12))
    assert report.best_regret < report.start_regret / 2


def test_text_that_switches_can_be_left_out(toys: ModuleType) -> None:
    report = _train(toys, toys.mixtral(), dataclasses.replace(FAST, switching=False))
    assert set(report.oracle_losses) == set(toys.OWN)


def test_training_never_makes_heldout_loss_worse(toys: ModuleType) -> None:
    model = toys.mixtral()
    fit(model, toys.domains(), toys.OWN)
    before = _gates(model)
    harmful = dataclasses.replace(
        FAST, learning_rate=50.0, domain_weight=0, balance_weight=1e4, patience=2
    )
    report = _train(toys, model, harmful)
    assert report.best_step == 0 and report.best_loss == report.start_loss
    assert report.steps == 4 and len(report.history) == 3
    assert _same(before, _gates(model))


def test_the_best_gates_are_the_ones_that_stay(toys: ModuleType) -> None:
    model = toys.mixtral()
    report = _train(toys, model, dataclasses.replace(FAST, learning_rate=1.0))
    again = _train(toys, model, dataclasses.replace(FAST, steps=1))
    assert again.start_loss == report.best_loss < report.start_loss


def test_a_seed_decides_everything(toys: ModuleType) -> None:
    models = [toys.mixtral() for _repeat in range(3)]
    torch.manual_seed(5)
    first = _train(toys, models[0])
    state = torch.get_rng_state()
    second = _train(toys, models[1])
    assert torch.equal(state, torch.get_rng_state())
    assert first.history == second.history and _same(_gates(models[0]), _gates(models[1]))
    _train(toys, models[2], dataclasses.replace(FAST, seed=1))
    assert not _same(_gates(models[0]), _gates(models[2]))


def test_bf16_gates_take_steps_smaller_than_their_precision(toys: ModuleType) -> None:
    small = dataclasses.replace(FAST, learning_rate=2e-5, steps=40, eval_every=40, domain_weight=1)
    model = toys.mixtral().bfloat16()
    for gate in find_gates(model):
        gate.module.get_parameter("weight").data.fill_(0.25)
    before = _gates(model)
    report = _train(toys, model, small)
    assert report.history[-1].own_share > report.history[0].own_share
    assert all(one.dtype == torch.bfloat16 for one in _gates(model))
    assert not _same(before, _gates(model))


def _with_sigmoid_gates(model: nn.Module) -> nn.Module:
    return _with_gates(model, RouterSpec(kind="sigmoid", top_k=2))


def _with_gates(model: nn.Module, spec: RouterSpec) -> nn.Module:
    for gate in find_gates(model):
        router = Router(gate.module.get_parameter("weight").shape[1], gate.experts, spec)
        model.get_submodule(gate.name.removesuffix(".gate")).gate = router
    return model


def _biases(model: nn.Module) -> list[torch.Tensor]:
    return [gate.module.get_buffer("selection_bias").clone() for gate in find_gates(model)]


def test_loss_free_balancing_evens_the_load(toys: ModuleType) -> None:
    model = _with_sigmoid_gates(toys.mixtral())
    for gate in find_gates(model):
        generator = torch.Generator().manual_seed(gate.layer)
        gate.module.get_parameter("weight").data.normal_(std=0.3, generator=generator)
        gate.module.get_buffer("selection_bias")[0] = 1.0
    before = _gates(model)
    bias = dataclasses.replace(
        FAST, steps=20, eval_every=20, balance="bias", bias_step=0.1, learning_rate=1e-6
    )
    report = _train(toys, model, bias)
    assert report.history[-1].max_violation < report.history[0].max_violation / 2
    assert report.history[-1].load_entropy > report.history[0].load_entropy
    assert report.parameters == sum(weight_EW.numel() for weight_EW in before)
    assert [name.rsplit(".", 1)[1] for name in report.balanced] == ["selection_bias"] * 2


def test_biases_belong_to_the_state_that_is_kept(toys: ModuleType) -> None:
    kept = _with_sigmoid_gates(toys.mixtral())
    bias = dataclasses.replace(FAST, balance="bias", objective="domain", learning_rate=0.1)
    report = _train(toys, kept, bias)
    assert report.best_step > 0
    steps = [float(bias_E.abs().max()) / bias.bias_step for bias_E in _biases(kept)]
    assert max(steps) > 0
    assert all(step <= report.best_step + 1e-3 for step in steps)
    harmed = _with_sigmoid_gates(toys.mixtral())
    worse = dataclasses.replace(bias, objective="language", learning_rate=50.0, bias_step=9.0)
    if _train(toys, harmed, worse).best_step == 0:
        assert not any(bias_E.any() for bias_E in _biases(harmed))


@pytest.mark.parametrize(
    "spec",
    [
        RouterSpec(kind="softmax", top_k=1, score="absolute"),
        RouterSpec(kind="softmax", top_k=3, mass=0.8),
        RouterSpec(kind="sigmoid", top_k=1),
    ],
)
def test_our_own_kinds_of_gates_learn(toys: ModuleType, spec: RouterSpec) -> None:
    model = _with_gates(toys.mixtral(), spec)
    for gate in find_gates(model):
        generator = torch.Generator().manual_seed(gate.layer)
        gate.module.get_parameter("weight").data.normal_(std=0.1, generator=generator)
    report = _train(toys, model, dataclasses.replace(_only("regret"), steps=12))
    assert report.best_regret < report.start_regret / 2
    assert report.parameters == 2 * toys.EXPERTS * toys.WIDTH


def test_regret_needs_gates_over_the_same_experts(toys: ModuleType) -> None:
    gates = find_gates(toys.mixtral())
    odd = [gates[0], dataclasses.replace(gates[1], experts=3)]
    with pytest.raises(InputError, match="over the same experts"):
        check_objective(odd, _only("regret"))


def test_balance_by_bias_needs_gates_with_one(toys: ModuleType) -> None:
    with pytest.raises(InputError, match="selection bias"):
        _train(toys, toys.mixtral(), dataclasses.replace(FAST, balance="bias"))


class _Interrupted(Exception):
    pass


class _Interrupting(Silent):
    def __init__(self, notes: int) -> None:
        self.notes = notes

    def note(self, message: str) -> None:
        self.notes -= 1
        if self.notes == 0:
            raise _Interrupted(message)


@pytest.mark.parametrize(("notes", "balance"), [(1, "loss"), (3, "bias")])
def test_a_stopped_run_goes_on_to_the_same_bits(
    toys: ModuleType, tmp_path: Path, notes: int, balance: Any
) -> None:
    def fresh() -> nn.Module:
        model = toys.mixtral() if balance == "loss" else _with_sigmoid_gates(toys.mixtral())
        return model.bfloat16()

    whole, stopped = fresh(), fresh()
    plain = dataclasses.replace(FAST, balance=balance)
    expected = _train(toys, whole, plain)
    settings = dataclasses.replace(plain, checkpoint=tmp_path / "state")
    data, heldout, before = toys.domains(5), toys.domains(3, seed=1), _gates(stopped)
    with pytest.raises(_Interrupted):
        train(stopped, data, heldout, toys.OWN, settings, _Interrupting(notes))
    assert _same(before, _gates(stopped))
    report = train(stopped, data, heldout, toys.OWN, settings)
    assert report.history == expected.history
    assert report.oracle_losses == expected.oracle_losses
    assert _same(_gates(whole), _gates(stopped))
    if balance == "bias":
        assert _same(_biases(whole), _biases(stopped))
    assert sorted(path.suffix for path in (tmp_path / "state").iterdir()) == [
        ".json",
        ".safetensors",
    ]


def test_a_finished_run_is_only_read(toys: ModuleType, tmp_path: Path) -> None:
    settings = dataclasses.replace(FAST, checkpoint=tmp_path)
    first, second = toys.mixtral(), toys.mixtral()
    report = _train(toys, first, settings)
    again = _train(toys, second, settings)
    assert again.history == report.history and again.steps == report.steps
    assert _same(_gates(first), _gates(second))


def test_a_foreign_or_damaged_checkpoint_is_refused(toys: ModuleType, tmp_path: Path) -> None:
    settings = dataclasses.replace(FAST, checkpoint=tmp_path)
    _train(toys, toys.mixtral(), settings)
    others = [
        (toys.mixtral(seed=1), settings),
        (toys.mixtral(), dataclasses.replace(settings, learning_rate=1e-4)),
        (toys.mixtral(), dataclasses.replace(settings, objective="regret")),
    ]
    for model, other in others:
        with pytest.raises(InputError, match="another run"):
            _train(toys, model, other)
    (tensors,) = tmp_path.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with pytest.raises(InputError, match="has changed"):
        _train(toys, toys.mixtral(), settings)
    tensors.unlink()
    with pytest.raises(InputError, match="training tensors"):
        _train(toys, toys.mixtral(), settings)
    (tmp_path / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(InputError, match="training state"):
        _train(toys, toys.mixtral(), settings)


def test_one_expert_and_a_loss_that_cannot_teach_it_are_refused(toys: ModuleType) -> None:
    for objective in ("language", "distill"):
        with pytest.raises(InputError, match="domain_weight must be positive"):
            _train(toys, toys.mixtral(active=1), _only(objective))
    only = dataclasses.replace(FAST, domain_weight=0)
    model = toys.plant(toys.olmoe(active=1))
    assert _train(toys, model, only).steps > 0


def test_a_model_of_nan_is_refused(toys: ModuleType) -> None:
    model = toys.mixtral()
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="finite held-out loss"):
        _train(toys, model)


def test_text_without_an_own_expert_is_refused(toys: ModuleType) -> None:
    data, heldout = toys.domains(5), toys.domains(3)
    with pytest.raises(InputError, match="'law' has none"):
        train(toys.mixtral(), data, heldout, {"code": 0, "poems": 1}, FAST)
    with pytest.raises(InputError, match="there is none"):
        train(toys.mixtral(), data, {}, toys.OWN, FAST)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"z_weight": -1.0},
        {"patience": 0},
        {"bias_step": 0.0},
        {"objective": "hindsight"},
        {"balance": "sinkhorn"},
    ],
)
def test_settings_name_the_wrong_field(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainSettings(**wrong)  # pyright: ignore[reportArgumentType]
