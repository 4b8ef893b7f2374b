"""Routers that remember earlier tokens give the same logits however the model is run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from moiety.compose.kinds import builder_of
from moiety.compose.recipe import Recipe
from moiety.compose.stages import Stages
from moiety.errors import InputError
from moiety.routers import Router, find_gates

IDS = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "context": {"router": {"context": [4, 16, "mean"]}},
    "sequence": {"router": {"kind": "sequence"}},
    "split": {"router": {"context": [4]}, "routers": "split"},
    "span": {"router": {"context": [4], "span": "all"}},
    "sigmoid": {"router": {"kind": "sigmoid", "context": [8]}},
    "everything": {"router": {"context": [4]}, "norms": "routed"},
}


@pytest.fixture(scope="module")
def folders(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A composite of every kind with gates drawn at random, so that routes differ by token."""
    root = tmp_path_factory.mktemp("memory")
    found: dict[str, Path] = {}
    for kind, fields in KINDS.items():
        compose = {"kind": "routed", "top_k": 2, "shared": "soup", **fields}
        recipe = Recipe.read(world.write_recipe(root / f"{kind}.yaml", compose=compose))
        builder: Any = builder_of(recipe, Stages(root / "stages"))
        found[kind] = root / kind
        found[kind].mkdir()
        builder.assemble(found[kind], builder.shared_tensors, None)
        model = AutoModelForCausalLM.from_pretrained(found[kind])
        torch.manual_seed(1)
        for gate in find_gates(model):
            gate.module.get_parameter("weight").data.normal_(std=0.5)
        model.save_pretrained(found[kind])
    return found


@pytest.fixture(params=list(KINDS), scope="module")
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders[request.param]).eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **keywords: Any) -> Tensor:
    return model(input_ids=ids, **keywords).logits


def test_earlier_tokens_decide(model: Any) -> None:
    """The control of everything below: a route does depend on what came before."""
    routes: list[Tensor] = []
    gate = find_gates(model)[-1]
    handle = gate.module.register_forward_hook(lambda _m, _i, output: routes.append(output[0]))
    logits(model)
    handle.remove()
    alone: Any = gate.module
    hidden = torch.randn(1, 6, alone.width)
    inside, cut = alone(hidden)[0][-1], alone(hidden[:, -1:])[0][-1]
    assert (inside - cut).abs().max() > 1e-3
    assert routes[0].shape == (40, 3)


@pytest.mark.parametrize("pieces", [(19, 1), (1,) * 20, (7, 6, 7)])
def test_prefill_and_decode_are_the_whole(model: Any, pieces: tuple[int, ...]) -> None:
    whole = logits(model)
    for cache in (
        DynamicCache(config=model.config),
        DynamicCache(),
        StaticCache(config=model.config, max_cache_len=32),
    ):
        found, start = [], 0
        for piece in pieces:
            part = IDS[:, start : start + piece]
            found.append(logits(model, part, past_key_values=cache, use_cache=True))
            start += piece
        close(torch.cat(found, 1), whole)
        assert len(cache.layers) == model.config.num_hidden_layers + 1


def test_left_padding_changes_nothing(model: Any) -> None:
    padded = torch.cat([torch.full((2, 5), 2), IDS], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.int64), torch.ones_like(IDS)], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    close(logits(model, padded, attention_mask=mask, position_ids=position)[:, 5:], logits(model))


def test_right_padding_changes_nothing(model: Any) -> None:
    padded = torch.cat([IDS, torch.full((2, 5), 2)], 1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(2, 5, dtype=torch.int64)], 1)
    close(logits(model, padded, attention_mask=mask)[:, :20], logits(model))


def test_packed_documents_do_not_see_each_other(model: Any) -> None:
    one, other = IDS[:1], IDS[1:, :13]
    packed = torch.cat([one, other], 1)
    position = torch.cat([torch.arange(20), torch.arange(13)])[None]
    found = logits(model, packed, position_ids=position, use_cache=False)
    close(found[:, :20], logits(model, one))
    close(found[:, 20:], logits(model, other))


def test_generation_is_the_same_however_it_is_run(model: Any) -> None:
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    plain = model.generate(IDS, attention_mask=mask, **settings)
    for changed in (
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
    ):
        rows = slice(0, 1) if "prompt_lookup_num_tokens" in changed else slice(0, 2)
        again = model.generate(IDS[rows], attention_mask=mask[rows], **settings, **changed)
        assert torch.equal(again, plain[rows]), changed
    padded = torch.cat([torch.full((2, 3), 2), IDS], 1)
    padding = torch.cat([torch.zeros(2, 3, dtype=torch.int64), mask], 1)
    for changed in ({}, {"cache_implementation": "static"}):
        left = model.generate(padded, attention_mask=padding, **settings, **changed)
        assert torch.equal(left[:, 23:], plain[:, 20:]), changed


def test_beams_carry_their_own_memory(model: Any) -> None:
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    mask = torch.ones_like(IDS)
    cached = model.generate(IDS, attention_mask=mask, **settings)
    assert torch.equal(
        cached, model.generate(IDS, attention_mask=mask, use_cache=False, **settings)
    )


def test_drafts_that_are_rejected_are_forgotten(model: Any, folders: dict[str, Path]) -> None:
    """The draft is another model, so that tokens are rejected and the cache is cropped."""
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    other = "sequence" if find_gates(model)[0].module.spec.context else "context"  # pyright: ignore
    draft = AutoModelForCausalLM.from_pretrained(folders[other]).eval()
    mask = torch.ones_like(IDS[:1])
    plain = model.generate(IDS[:1], attention_mask=mask, **settings)
    helped = model.generate(IDS[:1], attention_mask=mask, assistant_model=draft, **settings)
    assert torch.equal(helped, plain)


def test_a_cropped_cache_goes_on_as_if_nothing_had_been(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    logits(model, torch.cat([IDS[:, :12], IDS[:, :5]], 1), past_key_values=cache, use_cache=True)
    cache.crop(-5)
    found = logits(model, IDS[:, 12:], past_key_values=cache, use_cache=True)
    close(found, logits(model)[:, 12:])


@pytest.mark.parametrize("model", ["sequence", "split", "sigmoid", "everything"], indirect=True)
def test_it_compiles_whole(model: Any) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(logits(compiled), logits(model))


def test_a_cache_that_other_models_filled_is_refused(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    logits(model, past_key_values=cache, use_cache=True)
    del cache.layers[-1]
    with pytest.raises(InputError, match="holds 20 tokens that the routers have not seen"):
        logits(model, past_key_values=cache, use_cache=True)


def test_one_router_decides_for_all_layers(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["span"])
    routers = [module for module in model.modules() if isinstance(module, Router)]
    assert len(routers) == 1
    assert len(find_gates(model)) == 1
