"""Invariants of a built composite: they hold, they notice, and checking leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moiety.analysis.controls import evaluate_build
from moiety.compose import Recipe, build, open_composite
from moiety.compose.account import counts
from moiety.compose.invariants import check_invariants, routes
from moiety.compose.kinds import builder_of
from moiety.compose.routing import RoutingBuilder
from moiety.compose.stages import Stages
from moiety.errors import InvariantError
from moiety.experts.checkpoint import Checkpoint
from moiety.files import digest_of_folder
from moiety.routers import find_gates

IDS = torch.arange(3, 43).reshape(2, 20)
QUICK = {"prune": {"method": "magnitude", "refit_steps": 0}, "route": {"train_steps": 0}}
KINDS = {
    "mixture": {"shared": "base"},
    "routed": {"kind": "routed", "shared": "base", "norms": "routed"},
    "routed without base": {"kind": "routed", "base": "none", "shared": "base", "top_k": 2},
}


@pytest.fixture(scope="module", params=KINDS)
def built(request: Any, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("invariants")
    recipe = Recipe.model_validate(world.recipe(compose=KINDS[request.param], **QUICK))
    build(recipe, folder / "out", work=folder / "stages", check=False)
    return builder_of(recipe, Stages(folder / "stages")), folder / "out"


def test_all_hold_and_each_expert_is_made_once(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    builder, out = built
    before, made = digest_of_folder(out), []
    twin = type(builder).twin

    def counted(self: RoutingBuilder, name: str | None) -> dict[str, torch.Tensor]:
        made.append(name)
        return twin(self, name)

    monkeypatch.setattr(type(builder), "twin", counted)
    found = check_invariants(builder, out)
    assert all(invariant.holds for invariant in found)
    statements = [invariant.statement for invariant in found]
    on_base = builder.recipe.compose.kind == "routed" and builder.recipe.compose.base == "dense"
    assert ("the constant route 0.3 is task arithmetic" in statements) == on_base
    assert "experts in another order change nothing but the routes' names" in statements
    assert "equal experts are that expert, whatever the router" in statements
    assert len(statements) == len(set(statements)) == 3 + 3 + on_base
    names = [name for name in made if name is not None]
    assert names == builder.recipe.names and made.count(None) == on_base
    assert digest_of_folder(out) == before


def test_a_changed_order_is_undone_exactly(built: Any) -> None:
    _, out = built
    model = open_composite(out, torch.float32).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gates = {gate.name for gate in find_gates(model)}
    routes._change(model, routes._reversed, gates)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    stacks = {n for n in before if ".experts" in n or n.rpartition(".")[0] in gates}
    assert changed and changed <= stacks
    assert all(any(name.startswith(f"{gate}.") for name in changed) for gate in gates)
    routes._change(model, routes._reversed, gates)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_composite_with_another_shared_part_is_noticed(built: Any, tmp_path: Path) -> None:
    builder, out = built
    model: Any = open_composite(out).model
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    builder.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InvariantError, match="the one-hot route to letters is that expert"):
        check_invariants(builder, tmp_path)


ALONE = {
    "ensemble": {"kind": "ensemble", "prior": {"letters": 1, "numbers": 2, "colours": 3}},
    "reprune": {"kind": "merge", "sparse": "reprune", "parameters": {"weight": 0.4}},
    "conflict_aware": {"kind": "merge", "sparse": "conflict_aware", "parameters": {"weight": 1}},
    "none": {"kind": "merge", "sparse": "none", "method": "linear", "parameters": {"weight": 1}},
}


@pytest.mark.parametrize("kind", ALONE)
def test_models_that_route_nothing_have_theirs(world: Any, tmp_path: Path, kind: str) -> None:
    recipe = Recipe.model_validate(world.recipe(compose=ALONE[kind], **QUICK))
    report = build(recipe, tmp_path / "out")
    statements = " ".join(invariant["statement"] for invariant in report.invariants)
    expected = {
        "ensemble": ("all weight on numbers", "another order", "equal experts", "opened again"),
        "reprune": ("all 14 pruned matrices have the pattern 2:4", "packed", "opened again"),
        "conflict_aware": ("pattern 2:4", "packed", "opened again on its base"),
        "none": ("opened again",),
    }[kind]
    assert all(part in statements for part in expected)
    found = counts(report.facts["tensors"])
    whole = len(Checkpoint(world.base))
    assert all(sum(by_use.values()) == whole and not by_use["unknown"] for by_use in found.values())
    use = "used" if kind == "ensemble" else "merged"
    assert all(found[name][use] == whole for name in recipe.names)
    has_base = kind in ("reprune", "conflict_aware")
    assert found["base"]["merged" if has_base else "superseded"] == whole
    measured = evaluate_build(recipe, report.composite, tmp_path / "out.stages")["loss"]
    assert measured["composite"].keys() == measured["composite_dense"].keys() == set(recipe.names)
    assert ("expert" in measured) == (kind == "ensemble")
