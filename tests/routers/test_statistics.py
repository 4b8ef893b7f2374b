"""Statistics of gates: whose tokens count, on which routes, of which features; kept on disk."""

import itertools
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moiety.errors import InputError, OutputError
from moiety.routers import (
    Flow,
    GateStatistics,
    Route,
    Router,
    RouterSpec,
    collect,
    find_gates,
    forced,
    merge,
    per_token,
    watched,
)
from moiety.routers.labelled import of_domain, stitched
from moiety.routers.statistics import enough, stitched_windows
from moiety.routers.statistics_file import load_statistics, save_statistics


class Rows(Router):
    """A router that gets its rows of tokens back, which stock mixtures flatten."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(self._rows(hidden))

    def features(self, hidden: Tensor) -> Tensor:
        return super().features(self._rows(hidden))

    def _rows(self, hidden: Tensor) -> Tensor:
        assert self._flow.ids_BS is not None
        return hidden.view(*self._flow.ids_BS.shape, -1)


def with_context(model: Any, spec: RouterSpec) -> Any:
    """A toy mixture whose gates are our routers."""
    flow = Flow(spec.horizons)

    def begin(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        flow.begin(kwargs["input_ids"], kwargs["attention_mask"])

    model.model.register_forward_pre_hook(begin, with_kwargs=True)
    for layer in model.model.layers:
        width, experts = model.config.hidden_size, model.config.num_local_experts
        layer.mlp.gate = Rows(width, experts, spec, flow)
    return model


def _expected(model: Any, toys: ModuleType, data: Any, domain: str, stitch: int) -> list[Tensor]:
    """Features of a domain's tokens in its own and in stitched windows, layer by layer."""
    texts = [of_domain(data[domain], toys.OWN[domain])]
    if stitch:
        texts.append(stitched(data, toys.OWN, stitch, seed=0, around=domain))
    gates = find_gates(model)
    found: list[list[Tensor]] = [[] for _gate in gates]
    for text in texts:
        counted_T = text.own_WC.flatten() == toys.OWN[domain]

        def listen(route: Route, counted_T: Tensor = counted_T) -> None:
            found[route.layer].append(route.features_TW[counted_T])

        with torch.no_grad(), forced(gates, per_token(text.own_WC)), watched(gates, listen):
            model(input_ids=text.ids_WC, attention_mask=text.mask_WC)
    return [torch.cat(pieces) for pieces in found]


@pytest.mark.parametrize(("stitch", "windows"), [(0.0, 0), (0.5, 3)])
@pytest.mark.parametrize("context", [(), (4, "mean")])
def test_statistics_are_those_of_the_counted_features(
    toys: ModuleType, context: Any, stitch: float, windows: int
) -> None:
    model, data = toys.mixtral(), toys.domains(5)
    if context:
        model = with_context(model, RouterSpec(context=context))
    features = {name: _expected(model, toys, data, name, windows) for name in data}
    found = collect(model, find_gates(model), data, toys.OWN, stitch=stitch, batch_size=2)
    width = toys.WIDTH * (1 + len(context))
    for statistics in found:
        gram_WW, sum_EW = torch.zeros(width, width), torch.zeros(toys.EXPERTS, width)
        for name, per_gate in features.items():
            features_TW = per_gate[statistics.layer]
            gram_WW += features_TW.T @ features_TW / len(features_TW)
            sum_EW[toys.OWN[name]] = features_TW.mean(0)
            assert int(statistics.count_E[toys.OWN[name]]) == len(features_TW)
        torch.testing.assert_close(statistics.gram_WW, gram_WW, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(statistics.sum_EW, sum_EW, atol=1e-4, rtol=1e-4)
        assert int(statistics.count_E[1]) == 0


def test_without_own_routes_tokens_go_where_the_gates_send_them(toys: ModuleType) -> None:
    model, data = toys.mixtral(active=1), toys.domains(3)
    gates = find_gates(model)
    means: list[list[Tensor]] = [[], []]
    for windows in data.values():
        kept_T = windows.mask_WC.flatten().bool()

        def listen(route: Route, kept_T: Tensor = kept_T) -> None:
            means[route.layer].append(route.hidden_TD[kept_T].mean(0))

        with torch.no_grad(), watched(gates, listen):
            model(input_ids=windows.ids_WC, attention_mask=windows.mask_WC)
    found = collect(model, gates, data, toys.OWN, stitch=0, own_routes=False)
    own = collect(model, gates, data, toys.OWN, stitch=0)
    rows = [toys.OWN[name] for name in data]
    for layer, per_domain in enumerate(means):
        torch.testing.assert_close(
            found[layer].sum_EW[rows], torch.stack(per_domain), atol=1e-5, rtol=1e-4
        )
    assert not torch.allclose(found[1].sum_EW, own[1].sum_EW, atol=1e-3)


def test_the_sample_is_spread_evenly_over_a_labels_text(toys: ModuleType) -> None:
    model, data = toys.mixtral(layers=1), toys.domains(6)
    gates = find_gates(model)
    everything = collect(model, gates, data, toys.OWN, stitch=0, sample=10**6)[0]
    assert torch.equal(everything.label_N.bincount(minlength=4), everything.count_E)
    some = collect(model, gates, data, toys.OWN, stitch=0, sample=20, batch_size=2)[0]
    for label in toys.OWN.values():
        all_NW = everything.sample_NW[everything.label_N == label]
        some_NW = some.sample_NW[some.label_N == label]
        place_N = torch.tensor([math.ceil(n * len(all_NW) / 20) - 1 for n in range(1, 21)])
        torch.testing.assert_close(some_NW, all_NW[place_N])


def _close(one: GateStatistics, other: GateStatistics) -> None:
    torch.testing.assert_close(one.gram_WW, other.gram_WW)
    torch.testing.assert_close(one.sum_EW, other.sum_EW)
    assert torch.equal(one.count_E, other.count_E)
    order, other_order = one.label_N.argsort(stable=True), other.label_N.argsort(stable=True)
    assert torch.equal(one.label_N[order], other.label_N[other_order])
    torch.testing.assert_close(one.sample_NW[order], other.sample_NW[other_order])


def test_no_more_windows_are_read_than_hold_the_tokens(toys: ModuleType) -> None:
    data, model = toys.domains(24), toys.mixtral(layers=1)
    law = data["law"]
    some = enough(law, 100)
    places = some.document_W.tolist()
    assert 100 * 24 // int(law.mask_WC.sum()) <= len(some) < 24
    assert max(b - a for a, b in itertools.pairwise(places)) <= 24 // len(some) + 1
    assert enough(law, None) is law and enough(law, 10**6) is law
    read: list[Tensor] = []
    with watched(find_gates(model), lambda route: read.append(route.hidden_TD)):
        [one] = collect(model, find_gates(model), data, toys.OWN, only=["law"], tokens=100)
    windows = stitched_windows(law, 100, 0.5) + len(some)
    assert sum(map(len, read)) == windows * 12
    assert one.count_E[toys.OWN["law"]] == 100


def test_domains_collected_one_by_one_are_those_collected_at_once(toys: ModuleType) -> None:
    model, data = toys.mixtral(), toys.domains(5)
    gates = find_gates(model)
    whole = collect(model, gates, data, toys.OWN, sample=16)
    poems = collect(model, gates, data, toys.OWN, only=["poems"], sample=16)
    rest = collect(model, gates, data, toys.OWN, only=["law", "code"], sample=16)
    for one, other in zip(whole, merge(poems, rest), strict=True):
        _close(one, other)
    with pytest.raises(InputError, match="both hold text of expert 3"):
        merge(whole, poems)
    with pytest.raises(InputError, match="same gates"):
        merge(whole, whole[:1])
    with pytest.raises(InputError, match="'maths'"):
        collect(model, gates, data, toys.OWN, only=["maths"])
    with pytest.raises(InputError, match=r"at least two experts.*stitch: 0"):
        collect(model, gates, {"poems": data["poems"]}, toys.OWN)


def test_statistics_of_fewer_experts_merge_with_those_of_more(toys: ModuleType) -> None:
    small = GateStatistics(
        name="gate",
        layer=0,
        gram_WW=torch.eye(2),
        sum_EW=torch.ones(1, 2),
        count_E=torch.tensor([4]),
        sample_NW=torch.empty(0, 2),
        label_N=torch.empty(0, dtype=torch.int64),
    )
    large = GateStatistics(
        name="gate",
        layer=0,
        gram_WW=2 * torch.eye(2),
        sum_EW=torch.tensor([[0.0, 0.0], [3.0, 4.0]]),
        count_E=torch.tensor([0, 7]),
        sample_NW=torch.ones(1, 2),
        label_N=torch.tensor([1]),
    )
    for pair in ((small, large), (large, small)):
        merged = merge([pair[0]], [pair[1]])[0]
        assert torch.equal(merged.gram_WW, 3 * torch.eye(2))
        assert torch.equal(merged.sum_EW, torch.tensor([[1.0, 1.0], [3.0, 4.0]]))
        assert merged.count_E.tolist() == [4, 7]
        assert merged.label_N.tolist() == [1]


def test_nan_activations_name_the_gate_and_the_domain(toys: ModuleType) -> None:
    model = toys.mixtral()
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate, but text of 'law'"):
        collect(model, find_gates(model), toys.domains(2), toys.OWN)


def test_statistics_come_back_from_disk_bit_for_bit(toys: ModuleType, tmp_path: Path) -> None:
    model = toys.mixtral()
    statistics = collect(model, find_gates(model), toys.domains(4), toys.OWN, sample=8)
    save_statistics(tmp_path / "kept", statistics)
    for one, other in zip(statistics, load_statistics(tmp_path / "kept"), strict=True):
        assert (one.name, one.layer) == (other.name, other.layer)
        for name in ("gram_WW", "sum_EW", "count_E", "sample_NW", "label_N"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(OutputError, match="absent or empty"):
        save_statistics(tmp_path / "kept", statistics)


def test_damaged_statistics_are_refused(toys: ModuleType, tmp_path: Path) -> None:
    model = toys.mixtral(layers=1)
    folder = tmp_path / "kept"
    with pytest.raises(InputError, match="there is none"):
        load_statistics(folder)
    save_statistics(folder, collect(model, find_gates(model), toys.domains(2), toys.OWN))
    tensors = folder / "statistics.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(InputError, match="differ"):
        load_statistics(folder)
    tensors.unlink()
    with pytest.raises(InputError, match="expected gate statistics"):
        load_statistics(folder)
    (folder / "gates.json").write_text("[]")
    with pytest.raises(InputError, match="expected gate statistics"):
        load_statistics(folder)
