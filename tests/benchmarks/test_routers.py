"""The benchmark of routers, on tiny models: it runs, goes on, and its figures mean what they say."""

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from benchmarks import routers as bench
from benchmarks import routing_models
from benchmarks.routing_measures import Reading, held, routing_figures, shares_after
from benchmarks.routing_models import Workshop
from benchmarks.routing_rows import all_rows
from benchmarks.routing_texts import character_tables, switches
from moiety.compose.recipe import Recipe
from moiety.errors import InputError
from moiety.files import read_json
from moiety.routers import collect, find_gates
from moiety.text import read_documents, token_windows
from tests.conftest import CONTEXT, World

FIRST = "^routed: (oracle|uniform), k=1$"
MORE = "^routed: (oracle|uniform|ridge|hash of the token), k=1$"


def arguments(world: World, folder: Path, only: str) -> Any:
    recipe = folder / "recipe.yaml"
    prune = {"method": "magnitude", "refit_steps": 0}
    world.write_recipe(recipe, calibration_windows=8, prune=prune)
    given = [str(recipe), "--quick", "--json", str(folder / "rows.json"), "--only", only]
    return bench.parser().parse_args(given)


@pytest.fixture(scope="module")
def measured(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("bench")
    first = bench.measure(arguments(world, folder, FIRST))
    return first, bench.measure(arguments(world, folder, MORE)), folder


def test_rows_are_kept_and_others_added(measured: Any) -> None:
    first, more, folder = measured
    assert [row["router"] for row in first["rows"]] == ["uniform", "oracle"]
    assert more["rows"][:2] == first["rows"]
    assert {row["router"] for row in more["rows"]} == {
        "uniform",
        "oracle",
        "hash of the token",
        "ridge",
    }
    assert read_json(folder / "rows.json") == more
    assert set(more["base"]) == {"letters", "numbers", "colours", "foreign"}


def test_figures_of_controls(measured: Any) -> None:
    rows = {row["router"]: row for row in measured[1]["rows"]}
    oracle, uniform, ridge = rows["oracle"], rows["uniform"], rows["ridge"]
    assert oracle["regret"] == 0 and oracle["switch"]["regret"] == 0
    assert oracle["own_domain_share"] == 1
    assert oracle["normalized_mutual_information"] == pytest.approx(1)
    assert oracle["switch"]["share_at"] == {"8": 1.0}
    assert uniform["switch"]["share_at"]["8"] == pytest.approx(1 / 3)
    assert uniform["load_entropy"] == pytest.approx(1)
    assert uniform["fit_seconds"] == 0 and uniform["decode_overhead"] is None
    assert ridge["fit_seconds"] > 0 and math.isfinite(ridge["decode_overhead"])
    assert math.isfinite(ridge["decode_milliseconds"]) and uniform["decode_milliseconds"] is None
    assert 0.5 < ridge["own_domain_share"] < 1
    assert rows["hash of the token"]["own_domain_share"] < ridge["own_domain_share"]


def test_tables_show_every_row(measured: Any) -> None:
    shown = bench.tables(measured[1])
    assert [table.row_count for table in shown] == [4, 0, 0]


def test_times_are_left_out_and_measured_later(world: World, tmp_path: Path) -> None:
    given = arguments(world, tmp_path, "^routed: ridge, k=1$")
    given.timing = "skip"
    [first] = bench.measure(given)["rows"]
    assert first["fit_seconds"] is first["decode_overhead"] is first["decode_milliseconds"] is None
    given.timing = "only"
    [second] = bench.measure(given)["rows"]
    assert second["fit_seconds"] > 0 and math.isfinite(second["decode_overhead"])
    times = ("fit_seconds", "decode_overhead", "decode_milliseconds")
    assert second == {**first, **{name: second[name] for name in times}}


def test_routers_that_see_the_same_read_the_text_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = {"method": "magnitude", "refit_steps": 0}
    recipe = Recipe.model_validate(world.recipe(calibration_windows=8, prune=prune))
    shop, passes = Workshop(recipe, tmp_path), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(args)
        return collect(*args, **kwargs)

    monkeypatch.setattr(routing_models, "collect", counted)
    made = [
        shop.make("routed", 1, {"context": context}, {"init": init})
        for context, init in (([], "ridge"), ([], "logistic"), ([4], "ridge"))
    ]
    assert len(passes) == 2
    alone = Workshop(recipe, tmp_path, sharing=False).make(
        "routed", 1, {"context": []}, {"init": "ridge"}
    )
    for one, other in zip(
        find_gates(made[0].composite.model), find_gates(alone.composite.model), strict=True
    ):
        weight_EW = one.module.get_parameter("weight")
        torch.testing.assert_close(weight_EW, other.module.get_parameter("weight"))


def test_other_settings_are_refused(world: World, measured: Any) -> None:
    changed = arguments(world, measured[2], FIRST)
    changed.windows = 3
    with pytest.raises(InputError, match="name another file or remove it"):
        bench.measure(changed)


def test_every_row_is_a_recipe(world: World, tmp_path: Path) -> None:
    shop = Workshop(Recipe.model_validate(world.recipe()), tmp_path)
    rows = all_rows(list(world.finetunes), 0, 2)
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        shop.builder(row.kind, row.k, row.router, row.route)


def test_mergekit_writes_the_gates(world: World, tmp_path: Path) -> None:
    prune = {"method": "magnitude", "refit_steps": 0}
    recipe = world.recipe(calibration_windows=8, prune=prune)
    shop = Workshop(Recipe.model_validate(recipe), tmp_path)
    gates = find_gates(shop.of_mergekit("hidden_avg", 2).composite.model)
    assert len(gates) == 2
    for gate in gates:
        weight_ED = gate.module.get_parameter("weight")
        assert weight_ED.shape == (3, 32)
        torch.testing.assert_close(weight_ED.norm(dim=1), torch.ones(3), atol=1e-2, rtol=0)
    assert all(len(prompts) > 1 for prompts in shop.prompts.values())


def test_split_halves_the_documents(world: World, tmp_path: Path) -> None:
    shop = Workshop(Recipe.model_validate(world.recipe()), tmp_path).split("numbers")
    assert shop.recipe.names == ["letters", "numbers_a", "numbers_b", "colours"]
    first, second = (list(expert.domain.documents()) for expert in shop.recipe.experts[1:3])
    assert sorted(first + second) == sorted(read_documents(world.texts["numbers"]["calibration"]))
    assert not set(first) & set(second)


def test_switched_text_changes_in_the_middle(world: World) -> None:
    data = {
        name: token_windows(world.tokenizer, read_documents(text["heldout"]), CONTEXT, 4)
        for name, text in world.texts.items()
    }
    text = switches(data, CONTEXT, repeats=2)
    assert text.ids_WC.shape == (12, CONTEXT)
    own_WC = text.own_WC
    assert bool((own_WC[:, : CONTEXT // 2] == own_WC[:, :1]).all())
    assert bool((own_WC[:, CONTEXT // 2 :] == own_WC[:, -1:]).all())
    assert bool((own_WC[:, 0] != own_WC[:, -1]).all())
    start = world.tokenizer.bos_token_id
    assert bool((text.ids_WC[:, 0] == start).all())
    assert not bool((text.ids_WC[:, 1:] == start).any())
    first = data["letters"].ids_WC[0, : CONTEXT // 2]
    assert text.ids_WC[0, : CONTEXT // 2].tolist() == first.tolist()


def test_share_after_a_switch_is_read_at_its_place() -> None:
    own_WC = torch.zeros(3, 64)
    own_WC[:, 32 + 12 :] = 1
    assert shares_after(own_WC, 32) == {"8": 0.0, "16": 1.0}


def test_figures_of_a_collapsed_router() -> None:
    experts_TLA = numpy.zeros((10, 2, 1), dtype=numpy.int64)
    reading = Reading(1.0, experts_TLA, numpy.ones((10, 2, 1)), torch.zeros(1, 10))
    figures = routing_figures({"a": reading, "b": reading}, 2)
    assert figures == {
        "own_domain_share": 0.5,
        "normalized_mutual_information": 0.0,
        "load_entropy": 0.0,
    }


def test_held_gates_compute_nothing_and_come_back(world: World, tmp_path: Path) -> None:
    prune = {"method": "magnitude", "refit_steps": 0}
    recipe = world.recipe(calibration_windows=8, prune=prune)
    made = Workshop(Recipe.model_validate(recipe), tmp_path).make("routed", 1, {"context": []})
    gates, hidden = find_gates(made.composite.model), torch.full((5, 32), math.nan)
    with held(gates, 2):
        logits_TE, weights_TA, experts_TA = gates[0].module(hidden)
    assert logits_TE.tolist() == [[0.0] * 3] * 5
    assert weights_TA.tolist() == [[0.5, 0.5]] * 5 and experts_TA.tolist() == [[0, 1]] * 5
    assert bool(gates[0].module(hidden)[0].isnan().all())


def test_character_tables_are_lines_of_five_cells() -> None:
    lines = character_tables()[0].split("\n")
    assert len(lines) == 80
    assert lines[0] == "0020,SPACE,Zs,WS,Na"
