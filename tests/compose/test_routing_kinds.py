"""Routers of every kind and start, from a recipe to a composite that opens."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from moiety.compose import Recipe, build, open_composite
from moiety.compose.arrow import arrow_weights
from moiety.compose.composite import gate_weights
from moiety.compose.routed.modules import RoutedLinear
from moiety.errors import InputError
from moiety.routers import Router, find_gates, forced, one_hot

IDS = torch.arange(3, 43).reshape(2, 20)


def made(world: Any, folder: Path, route: dict[str, Any], **compose: Any) -> Path:
    """A built composite; stages are shared by the tests of this file."""
    values = {"kind": "routed", "shared": "soup", **compose}
    route = {"train_steps": 0, **route}
    written = world.write_recipe(folder / "recipe.yaml", compose=values, route=route)
    out = folder / "out"
    build(written, out, work=folder.parent / "routing-stages")
    return out


@pytest.mark.parametrize(
    ("route", "compose"),
    [
        ({"init": "logistic"}, {"router": {"context": [8]}}),
        ({"init": "centroid"}, {"router": {"span": 2, "context": []}}),
        ({"init": "ridge"}, {"router": {"kind": "sigmoid"}, "top_k": 2}),
        ({"init": "ridge"}, {"router": {"kind": "sequence"}}),
        ({"init": "ridge"}, {"router": {"mass": 0.8}, "top_k": 3}),
        ({"init": "arrow"}, {"router": {"score": "absolute", "context": []}}),
        ({"init": "random"}, {"router": {"context": ["mean"]}, "routers": "split"}),
    ],
    ids=lambda value: "-".join(f"{v}" for v in value.values()).replace(" ", ""),
)
def test_every_kind_and_start_builds_and_opens(
    world: Any, tmp_path: Path, route: dict[str, Any], compose: dict[str, Any]
) -> None:
    folder = made(world, tmp_path, route, **compose)
    composite = open_composite(folder)
    routers = [module for module in composite.model.modules() if isinstance(module, Router)]
    assert routers and all(router.weight is not None for router in routers)
    assert any(bool(gate.any()) for gate in gate_weights(composite.model).values())
    logits = composite.model(input_ids=IDS).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("kind", ["uniform", "constant", "hash", "random"])
def test_kinds_that_learn_nothing(world: Any, tmp_path: Path, kind: str) -> None:
    router: dict[str, Any] = {"kind": kind}
    if kind == "constant":
        router["weights"] = dict(zip(world.finetunes, (0.5, 0.2, 0.1), strict=True))
    folder = made(world, tmp_path, {}, router=router)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    gates = find_gates(model)
    assert not [name for name, _ in model.named_parameters() if "router" in name]
    if kind in ("constant", "uniform"):
        weights = (0.5, 0.2, 0.1) if kind == "constant" else (1 / 3,) * 3

        def policy(_gate: Any, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            experts_TA = torch.arange(3).expand(len(logits_TE), 3)
            return torch.tensor(weights).expand(len(logits_TE), 3), experts_TA

        found = model(input_ids=IDS).logits
        with forced(gates, policy):
            torch.testing.assert_close(model(input_ids=IDS).logits, found)
    else:
        text = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        mask = torch.ones_like(IDS)
        cached = model.generate(IDS, attention_mask=mask, **text)
        assert torch.equal(
            cached, model.generate(IDS, attention_mask=mask, use_cache=False, **text)
        )


def test_arrow_is_the_direction_a_task_vector_answers_most(world: Any, tmp_path: Path) -> None:
    """Of all inputs of one size the first matrices answer that one the loudest."""
    folder = made(world, tmp_path, {"init": "random"}, router={"score": "absolute", "context": []})
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    weights = arrow_weights(model)
    block = model.model.layers[1]
    scale_D = block.input_layernorm(torch.ones(model.config.hidden_size))

    def answer(direction_D: torch.Tensor, expert: int) -> float:
        gates, total = find_gates(model), 0.0
        with forced(gates, one_hot(expert)), torch.no_grad():
            block._routes.set(block.router, direction_D.view(1, 1, -1))
            for linear in (m for m in block.self_attn.modules() if isinstance(m, RoutedLinear)):
                if linear is not block.self_attn.o_proj:
                    x = (direction_D * scale_D).view(1, 1, -1)
                    assert linear.weight is not None
                    base = torch.nn.functional.linear(x, linear.weight)
                    total += float((linear(x) - base).square().sum())
        return total

    generator = torch.Generator().manual_seed(0)
    for expert in range(3):
        best = answer(weights["model.layers.1.router"][expert], expert)
        others = torch.nn.functional.normalize(
            torch.randn(50, len(scale_D), generator=generator), dim=-1
        )
        assert best > max(answer(other, expert) for other in others)


def test_arrow_says_what_it_needs(world: Any, tmp_path: Path) -> None:
    folder = made(world, tmp_path, {"init": "random"}, router={"context": []})
    with pytest.raises(InputError, match="score: absolute"):
        arrow_weights(open_composite(folder).model)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"kind": "hash", "context": [8]}, "context is for kinds"),
        ({"kind": "constant", "weights": {"letters": 1.0}}, "must name every expert"),
        ({"kind": "constant"}, "weights are what kind: constant needs"),
        ({"horizon": 8}, "horizon"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_router(
    world: Any, tmp_path: Path, router: dict[str, Any], message: str
) -> None:
    values = world.recipe() | {"compose": {"kind": "routed", "router": router}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=message):
        Recipe.read(tmp_path / "recipe.yaml")
