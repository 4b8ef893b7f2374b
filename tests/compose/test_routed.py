"""Routed models: exact on every architecture, and at home in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from moiety.compose import Recipe, build, open_composite
from moiety.compose.account import counts
from moiety.compose.routed.builder import RoutedBuilder
from moiety.compose.routed.modules import RoutedLinear
from moiety.compose.stages import Stages
from moiety.errors import InputError
from moiety.experts.checkpoint import Checkpoint
from moiety.experts.delta import TaskVector
from moiety.experts.unpack import dense_view
from moiety.routers import find_gates, forced, one_hot

IDS = torch.arange(3, 43).reshape(2, 20)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": {"tie_word_embeddings": False},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def family(world: Any, folder: Path, architecture: str) -> dict[str, Any]:
    """A recipe for random finetunes of a random base of some architecture."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    settings = {**SMALL, **FAMILIES[architecture], "vocab_size": len(world.tokenizer)}
    config = AutoConfig.for_model(architecture, **settings)
    base = AutoModelForCausalLM.from_config(config)
    values = world.recipe()
    for name in ("base", *world.finetunes):
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        base.save_pretrained(folder / name)
        world.tokenizer.save_pretrained(folder / name)
    values["base"] = str(folder / "base")
    for expert in values["experts"]:
        expert["model"] = str(folder / expert["name"])
    values["prune"] = {"method": "magnitude", "refit_steps": 0}
    values["route"] = {"train_steps": 0}
    values["calibration_windows"] = 8
    return values


def reference(builder: RoutedBuilder, weights: dict[str, float]) -> PreTrainedModel:
    """The dense model that a constant route stands for, in the composite's shared part."""
    model = AutoModelForCausalLM.from_pretrained(builder.base.folder, dtype=torch.float32).eval()
    tied = model.all_tied_weights_keys or {}
    state = {n: tensor.clone() for n, tensor in model.state_dict().items() if n not in tied}
    for name, tensor in builder.shared_tensors.items():
        state[name] = tensor
    routed = [f"{module}.{end}" for module in builder.packing.modules for end in ("weight", "bias")]
    for name in [name for name in routed if name in state]:
        deltas = builder.settings.base == "dense"
        total = builder.base[name].clone() if deltas else torch.zeros_like(state[name])
        for expert, weight in weights.items():
            if name.endswith("bias"):
                own = builder.finetunes[expert][name]
            elif deltas:
                own = dict(TaskVector(builder.experts[expert], builder.base.folder).tensors())[name]
            else:
                own = dense_view(builder.experts[expert])[name].float()
            total += weight * (own - builder.base[name] if deltas else own)
        state[name] = total
    model.load_state_dict(state, strict=not tied)
    return model


@pytest.mark.parametrize("architecture", list(FAMILIES))
@pytest.mark.parametrize("base", ["dense", "none"])
def test_a_one_hot_route_is_the_expert_and_a_constant_one_the_merge(
    world: Any, tmp_path: Path, architecture: str, base: str
) -> None:
    values = family(world, tmp_path, architecture)
    shared = "soup" if base == "dense" else "letters"
    values["compose"] = {"kind": "routed", "base": base, "shared": shared}
    recipe = Recipe.model_validate(values)
    report = build(recipe, tmp_path / "out", work=tmp_path / "stages")
    tensors = counts(report.facts["tensors"])
    assert all(sum(t.values()) == len(Checkpoint(tmp_path / "base")) for t in tensors.values())
    assert not any(by_use["unknown"] for by_use in tensors.values())
    builder = RoutedBuilder(recipe, Stages(tmp_path / "stages"))
    composite = open_composite(tmp_path / "out", torch.float32)
    gates = find_gates(composite.model)
    assert len(gates) == 2
    for index, name in enumerate(recipe.names):
        with forced(gates, one_hot(index)):
            routed = logits(composite.model)
        alone = logits(reference(builder, {name: 1.0}))
        torch.testing.assert_close(routed, alone, rtol=1e-4, atol=1e-4)

    def constant(_gate: Any, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts_TA = torch.arange(3).expand(len(logits_TE), 3)
        return torch.tensor([0.2, 0.3, 0.4]).expand(len(logits_TE), 3), experts_TA

    with forced(gates, constant):
        mixed = logits(composite.model)
    merged = reference(builder, dict(zip(recipe.names, (0.2, 0.3, 0.4), strict=True)))
    torch.testing.assert_close(mixed, logits(merged), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def built(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    compose = {"kind": "routed", "top_k": 2, "shared": "soup"}
    build(world.write_recipe(folder / "recipe.yaml", compose=compose), folder / "out")
    return folder / "out"


def test_it_reloads_saves_and_generates_equally(built: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(built)
    model.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(model), logits(again))
    first, second = (load_file(f / "model.safetensors") for f in (built, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "again" / "moiety_shim.py").is_file()


def test_generation_is_the_same_however_it_is_run(built: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(built)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    plain = model.generate(IDS, attention_mask=mask, **settings)
    static = model.generate(IDS, attention_mask=mask, cache_implementation="static", **settings)
    uncached = model.generate(IDS, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(plain, static) and torch.equal(plain, uncached)
    padded = torch.cat([torch.full((2, 3), 2), IDS], 1)
    padding = torch.cat([torch.zeros(2, 3, dtype=torch.int64), mask], 1)
    left = model.generate(padded, attention_mask=padding, **settings)
    assert torch.equal(left[:, 23:], plain[:, 20:])
    beams = model.generate(IDS, attention_mask=mask, num_beams=3, **settings)
    assert beams.shape == (2, 26)
    assisted = model.generate(IDS[:1], attention_mask=mask[:1], assistant_model=model, **settings)
    assert torch.equal(assisted, plain[:1])


def test_it_compiles_whole(built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))


def test_the_gates_alone_learn(built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built)
    assert not [m for m in model.modules() if isinstance(m, RoutedLinear) and m.weight is None]
    for gate in find_gates(model):
        gate.module.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for gate in find_gates(model):
        gradient = gate.module.get_parameter("weight").grad
        assert gradient is not None and gradient.abs().sum() > 0


def test_permuted_experts_permute_routes_and_change_nothing_else(
    built: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(built)
    expected = logits(model)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        state = model.state_dict()
        for name, tensor in state.items():
            if ".experts" in name or name.endswith("router.weight"):
                state[name] = tensor[order].clone()
        model.load_state_dict(state)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_norms_embeddings_and_split_routers(world: Any, tmp_path: Path) -> None:
    """With all of it routed, a one-hot route is the sparse finetune itself."""
    for number, changes in enumerate(
        ({"norms": "routed", "embeddings": "routed"}, {"routers": "split"})
    ):
        values = family(world, tmp_path / str(number), "llama")
        values["compose"] = {"kind": "routed", "base": "none", "shared": "base", **changes}
        recipe = Recipe.model_validate(values)
        build(recipe, tmp_path / f"out{number}", work=tmp_path / "stages")
        composite = open_composite(tmp_path / f"out{number}", torch.float32)
        gates = find_gates(composite.model)
        assert len(gates) == (3 if number == 0 else 4)
        if number:
            continue
        builder = RoutedBuilder(recipe, Stages(tmp_path / "stages"))
        own = {n: t.float() for n, t in builder.finetunes["numbers"].items()}
        expert: Any = AutoModelForCausalLM.from_pretrained(
            builder.experts["numbers"], dtype="float32"
        )
        head: Any = composite.model.get_output_embeddings()
        with torch.no_grad():
            expert.get_output_embeddings().weight = torch.nn.Parameter(head.weight.clone())
        torch.testing.assert_close(expert.model.norm.weight, own["model.norm.weight"])
        with forced(gates, one_hot(1)):
            torch.testing.assert_close(
                logits(composite.model), logits(expert), rtol=1e-4, atol=1e-4
            )


def test_an_untied_head_is_routed_and_a_tied_one_refused(world: Any, tmp_path: Path) -> None:
    values = family(world, tmp_path, "phi3")
    values["compose"] = {"kind": "routed", "shared": "base", "head": "routed"}
    recipe = Recipe.model_validate(values)
    build(recipe, tmp_path / "out")
    composite = open_composite(tmp_path / "out")
    names = [gate.name for gate in find_gates(composite.model)]
    assert names[-1] == "lm_head.router" and len(names) == 3
    with forced(find_gates(composite.model), one_hot(0)):
        assert logits(composite.model).isfinite().all()
    tied = Recipe.model_validate(world.recipe(compose=values["compose"]))
    with pytest.raises(InputError, match="ties it to the embeddings"):
        build(tied, tmp_path / "tied")


def test_routed_norms_need_one_router_a_layer(world: Any) -> None:
    compose = {"kind": "routed", "norms": "routed", "routers": "split"}
    with pytest.raises(ValueError, match="norms: routed needs routers: layer"):
        Recipe.model_validate(world.recipe(compose=compose))
