"""Static merges from a recipe: sparse in every mode, exact where they can be, resumable."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import registered_methods
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import moiety.experts.quantizer  # noqa: F401
from moiety.compose import Recipe, build
from moiety.compose.merge import everything, merged
from moiety.compose.merged import MergeBuilder, check_merge
from moiety.compose.merged.conflict import contest
from moiety.compose.merged.packed import modules_at, pooled, verified, write_packed
from moiety.compose.recipe import Merge, Merging, Prune
from moiety.compose.stages import Stages
from moiety.errors import InputError
from moiety.experts import open_delta
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.delta import DeltaLinear, TaskVector
from moiety.experts.modules import SparseLinear
from moiety.experts.pattern import Pattern
from moiety.experts.settings import PruneSettings
from moiety.experts.unpack import dense_view

IDS = torch.arange(3, 43).reshape(2, 20)
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 1.0},
    "multislerp": {"weight": 1.0},
    "karcher": {},
    "model_stock": {},
    "sce": {"select_topk": 0.5},
    "ram": {},
    "ramplus_tl": {},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 1.0, "density": 0.5},
    "dare_linear": {"weight": 0.4, "density": 0.5},
    "dare_ties": {"weight": 0.4, "density": 0.5},
    "breadcrumbs": {"weight": 0.4, "density": 0.5},
    "breadcrumbs_ties": {"weight": 0.4, "density": 0.5},
    "della": {"weight": 1.0, "density": 0.5},
    "della_linear": {"weight": 0.4, "density": 0.5},
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.02},
    "arcee_fusion": {},
    "nuslerp": {"weight": 1.0},
    "passthrough": {},
}
COUNTS = {"slerp": 2, "nearswap": 2, "arcee_fusion": 1, "nuslerp": 2, "passthrough": 1}
"""Finetunes of methods that do not take three."""
FAST = {"method": "wanda", "refit_steps": 0}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def builder(world: Any, stages: Path, prune: Mapping[str, Any] = FAST, **compose: Any) -> Any:
    values = world.recipe(compose={"kind": "merge", **compose}, prune={**FAST, **prune})
    values["experts"] = values["experts"][: COUNTS.get(compose.get("method", ""), 3)]
    return MergeBuilder(Recipe.model_validate(values), Stages(stages))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all builds here, so that masks and masked experts are made once."""
    return tmp_path_factory.mktemp("stages")


def written(made: MergeBuilder, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    made.write(folder, **options)
    return folder


def sparse_matrices(model: Any, kind: type) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


@pytest.mark.parametrize(
    ("method", "sparse"),
    [
        *((method.spec.name, "shared_mask") for method in registered_methods()),
        *((method, "reprune") for method in ("karcher", "ties", "della_linear")),
    ],
)
def test_every_method_stays_two_of_four(
    world: Any, stages: Path, tmp_path: Path, method: str, sparse: str
) -> None:
    made = builder(world, stages, method=method, parameters=PARAMETERS[method], sparse=sparse)
    assert len(made.finetunes) == COUNTS.get(method, 3)
    folder = written(made, tmp_path / "merge")
    view, pattern = dense_view(folder), Pattern(2, 4)
    assert len(view.packed) == 14
    for name in view.packed:
        assert pattern.holds(view[name])
        assert not torch.equal(view[name].float(), made.base[name])
    assert made.facts()["kept_share"] == pytest.approx(0.5, abs=0.01)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(list(sparse_matrices(model, SparseLinear))) == 14
    dense = LlamaForCausalLM(made.base.config).eval()
    dense.load_state_dict({name: view[name].float() for name in view}, strict=False)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sparse", "pattern", "values"),
    [
        ("shared_mask", "4:8", "int8"),
        ("shared_mask", 0.5, "bf16"),
        ("reprune", 0.5, "int4"),
        ("reprune", "4:8", "fp16"),
        ("conflict_aware", "4:8", "bf16"),
        ("conflict_aware", "0.5", "int4"),
    ],
)
def test_other_patterns_and_values(
    world: Any, stages: Path, tmp_path: Path, sparse: str, pattern: Any, values: str
) -> None:
    prune = {"pattern": pattern, "values": values}
    made = builder(world, stages, prune, parameters={"weight": 0.4}, sparse=sparse)
    folder = written(made, tmp_path / "merge")
    facts = made.facts()
    assert facts["pattern"] == str(pattern)
    assert facts["matrices"] == 14
    assert facts["kept_share"] <= 0.5
    opened = open_delta(folder) if sparse == "conflict_aware" else None
    model = opened or AutoModelForCausalLM.from_pretrained(folder)
    assert logits(model).isfinite().all()
    kind = SparseLinear if opened is None else DeltaLinear
    assert len(list(sparse_matrices(model, kind))) == 14


def test_shared_masks_make_merging_exact(world: Any, stages: Path, tmp_path: Path) -> None:
    """The packed merge is the merge of the packed experts, and the one mask is the base's."""
    made = builder(
        world, stages, {"values": "fp32"}, parameters={"weight": 0.4}, sparse="shared_mask"
    )
    view = dense_view(written(made, tmp_path / "merge"))
    experts = {name: dense_view(folder) for name, folder in made.experts.items()}
    merging = Merging(method="task_arithmetic", parameters={"weight": 0.4})
    expected = merged(dense_view(made.mask), experts, merging, everything)
    masks = Checkpoint(made.mask)
    for name in view:
        assert torch.equal(view[name], expected[name])
        if name in view.packed:
            assert torch.equal(view.raw[f"{name}_mask"], masks[f"{name}_mask"])
            for expert in experts.values():
                assert torch.equal(expert.raw[f"{name}_mask"], masks[f"{name}_mask"])


def test_without_sparsity_it_is_mergekits_merge(world: Any, stages: Path, tmp_path: Path) -> None:
    parameters = {"weight": 0.4, "density": 0.5}
    made = builder(world, stages, method="dare_ties", parameters=parameters, sparse="none")
    folder = written(made, tmp_path / "merge")
    merging = Merging(method="dare_ties", parameters=dict(parameters))
    expected = merged(made.base, made.finetunes, merging, everything)
    assert {n: t.tolist() for n, t in Checkpoint(folder).items()} == {
        n: t.tolist() for n, t in expected.items()
    }
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(AutoTokenizer.from_pretrained(folder)) == len(made.tokenizer)
    assert (folder / "generation_config.json").is_file()


def test_dense_control_is_the_same_merge_unpruned(world: Any, stages: Path, tmp_path: Path) -> None:
    chosen = {"parameters": {"weight": 0.4}}
    made = builder(world, stages, sparse="shared_mask", **chosen)
    control = Checkpoint(written(made, tmp_path / "control", dense=True))
    plain = builder(world, stages, sparse="none", **chosen)
    whole = Checkpoint(written(plain, tmp_path / "plain"))
    assert control.shapes() == made.base.shapes()
    assert all(torch.equal(control[name], whole[name]) for name in control)


def test_conflict_aware_adds_one_finetunes_difference_at_each_place(
    world: Any, stages: Path, tmp_path: Path
) -> None:
    made = builder(
        world, stages, {"values": "fp32"}, parameters={"weight": 0.4}, sparse="conflict_aware"
    )
    folder = written(made, tmp_path / "merge")
    vector, base = TaskVector(folder), made.base
    for module in made.modules:
        name = f"{module}.weight"
        delta_OI = vector.packed(module).dense()
        assert Pattern(2, 4).holds(delta_OI)
        each = torch.stack([0.4 * (ft[name] - base[name]) for ft in made.finetunes.values()])
        exact = torch.isclose(each, delta_OI, rtol=1e-5, atol=0)
        assert exact.any(0)[delta_OI != 0].all()
    merging = Merging(method="task_arithmetic", parameters={"weight": 0.4})
    whole = merged(base, made.finetunes, merging, everything)
    dense = dict(vector.tensors())
    rest = [name for name in base if name.removesuffix(".weight") not in made.modules]
    assert all(torch.equal(dense[name], whole[name]) for name in rest)
    model = LlamaForCausalLM(base.config).eval()
    model.load_state_dict(dense, strict=False)
    torch.testing.assert_close(logits(open_delta(folder)), logits(model), rtol=1e-4, atol=1e-4)
    facts = made.facts()
    assert sum(facts["places"].values()) == pytest.approx(1)
    assert set(facts["places"]) == set(world.finetunes)
    assert facts["bytes"] < facts["base_bytes"]


def test_conflicts_go_to_the_higher_score() -> None:
    deltas = {"a": torch.tensor([[4.0, 1, 3, 0]]), "b": torch.tensor([[-1.0, 2, -2, 0.5]])}
    ones = dict.fromkeys("ab", torch.ones(4))
    even = contest(deltas.items(), {"a": 1.0, "b": 1.0}, ones, Pattern(2, 4))
    assert even.delta_OI.tolist() == [[4, 0, 3, 0]]
    assert even.places == {"a": 2, "b": 0}
    heavy = contest(deltas.items(), {"a": 1.0, "b": -2.0}, ones, Pattern(2, 4))
    assert heavy.delta_OI.tolist() == [[4, -4, 0, 0]]
    assert heavy.places == {"a": 1, "b": 1}
    norms = {"a": torch.ones(4), "b": torch.tensor([1.0, 1, 1, 9])}
    fed = contest(deltas.items(), {"a": 1.0, "b": 1.0}, norms, Pattern(2, 4))
    assert fed.delta_OI.tolist() == [[4, 0, 0, 0.5]]
    assert bool((fed.mask_OI == (fed.delta_OI != 0)).all())


@pytest.mark.parametrize("sparse", ["shared_mask", "conflict_aware", "none"])
def test_the_weight_is_chosen_on_calibration_text(
    world: Any, stages: Path, tmp_path: Path, sparse: str
) -> None:
    made = builder(world, stages, sparse=sparse)
    facts = made.facts()
    losses = facts["calibration_loss"]
    assert f"{facts['weight']:g}" == min(losses, key=lambda weight: losses[weight])
    assert made.merging.parameters == {"weight": facts["weight"]}
    assert len(set(losses.values())) == len(losses) == 4 + (sparse == "conflict_aware")


def test_the_domains_activations_steer_conflicts(world: Any, stages: Path) -> None:
    chosen = {"parameters": {"weight": 0.4}, "sparse": "conflict_aware"}
    by_text = builder(world, stages, **chosen)
    by_size = builder(world, stages, {"method": "magnitude"}, **chosen)
    assert {float(n.max()) for norms in by_size.norms.values() for n in norms.values()} == {1.0}
    one, other = (Checkpoint(made.made / "model") for made in (by_text, by_size))
    masks = [name for name in one if name.endswith("_mask")]
    assert not all(torch.equal(one[name], other[name]) for name in masks)
    first = by_text.norms[by_text.modules[0]]
    assert len({tuple(norm_I.tolist()) for norm_I in first.values()}) == len(world.finetunes)


def test_an_interrupted_build_goes_on_and_gives_the_same_bytes(
    world: Any, stages: Path, tmp_path: Path
) -> None:
    def again(folder: Path) -> MergeBuilder:
        return builder(world, folder, parameters={"weight": 0.4}, sparse="shared_mask")

    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    whole = contents(written(again(stages), tmp_path / "whole"))
    started = again(tmp_path / "b")
    assert started.mask.is_dir()
    resumed = again(tmp_path / "b")
    assert contents(written(resumed, tmp_path / "resumed")) == whole
    names = {path.name.rpartition("-")[0] for path in (tmp_path / "b").iterdir() if path.is_dir()}
    expected = {"shared-mask", "packed-merge", "merged", *(f"masked-{n}" for n in world.finetunes)}
    assert names - {""} == expected


def test_builds_from_a_recipe(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"kind": "merge", "sparse": "conflict_aware", "parameters": {"weight": 0.4}}
    recipe = world.write_recipe(tmp_path / "recipe.yaml", compose=section, prune=FAST)
    report = build(recipe, tmp_path / "merge")
    assert report.kind == "merge"
    assert report.facts["kept_share"] == 0.5
    assert report.experts == {}
    assert build(recipe, tmp_path / "merge").to_dict() == report.to_dict()
    assert logits(open_delta(tmp_path / "merge")).isfinite().all()
    broken = world.write_recipe(
        tmp_path / "broken.yaml", compose={**section, "method": "slerp"}, prune=FAST
    )
    with pytest.raises(InputError, match="slerp cannot merge 3 finetunes"):
        build(broken, tmp_path / "never")


def test_verification_finds_a_broken_matrix(world: Any, stages: Path, tmp_path: Path) -> None:
    made = builder(world, stages, parameters={"weight": 0.4}, sparse="shared_mask")
    model = made.made / "model"
    with pytest.raises(InputError, match="expected 3 packed matrices"):
        verified(model, made.base, made.modules[:3], "2:4")
    with pytest.raises(InputError, match=r"for\s+pattern 1:4"):
        verified(model, made.base, made.modules, "1:4")
    name = f"{made.modules[0]}.weight"
    broken = {
        n: (t, torch.zeros_like(t, dtype=torch.bool) if n == name else None)
        for n, t in made.base.items()
    }
    (tmp_path / "broken").mkdir()
    with pytest.raises(InputError, match=rf"{name}: expected a mask that keeps exactly 2:4"):
        write_packed(
            tmp_path / "broken", made.base, broken.items(), [made.modules[0]], PruneSettings()
        )


def test_sites_limit_what_is_sparse(world: Any, stages: Path) -> None:
    made = builder(
        world, stages, {"sites": "ffn"}, parameters={"weight": 0.4}, sparse="conflict_aware"
    )
    assert made.facts()["matrices"] == 6
    assert made.modules == modules_at(made.base.config, "ffn")
    assert all(".mlp." in module for module in made.modules)


def test_pooled_text_has_as_much_of_each_domain() -> None:
    texts = {"a": ["a" * 10] * 9, "b": ["b" * 30] * 2, "c": ["c" * 20] * 50}
    counts = {name: "".join(pooled(texts)).count(name) for name in texts}
    assert counts == {"a": 60, "b": 60, "c": 60}


REFUSALS = [
    (Merge(method="sce", sparse="conflict_aware"), {}, "conflict_aware: .*task vectors.*reprune"),
    (Merge(method="ties", parameters={"weight": "auto"}), {}, "cannot be auto for ties"),
    (Merge(sparse="conflict_aware"), {"recover": True}, "prune.recover"),
    (Merge(), {"pattern": "dense"}, "prune.pattern is dense"),
    (Merge(method="slerp", parameters={"t": 0.5}), {}, "slerp cannot merge 3"),
    (Merge(method="karcher", parameters={"weight": "auto"}), {}, "karcher has no parameter weight"),
    (Merge(method="ties"), {}, "ties needs the parameter weight"),
]


@pytest.mark.parametrize(("settings", "prune", "message"), REFUSALS)
def test_refused_before_any_work(settings: Merge, prune: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_merge(settings, Prune(**prune), ["a", "b", "c"])


def test_only_a_weight_can_be_auto() -> None:
    with pytest.raises(ValueError, match="only weight can be auto"):
        Merge(parameters={"lambda": "auto"})
