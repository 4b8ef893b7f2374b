"""mergekit's merges in memory: against the formulae, mergekit's own results, its contracts."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from mergekit.merge_methods import (
    TensorGroup,
    get,
    merge_method,
    merge_state_dicts,
    registered_methods,
    registry,
)
from torch import Tensor

from moiety.compose.merge import (
    BASE,
    check_merging,
    everything,
    merged,
    soup,
    streamed,
    streaming,
    task_arithmetic,
)
from moiety.compose.merge.properties import coefficients, depends_on_weight, keeps_zeros
from moiety.compose.merge.roles import roles
from moiety.compose.merge.streaming import tensor_seed
from moiety.compose.recipe import Merging
from moiety.errors import InputError

NAMES = ("base", "law", "code")
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": {"base": 1.0, "law": 2.0, "code": 0.5}},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": {"base": 1.0, "law": 2.0}},
    "multislerp": {"weight": 0.5},
    "karcher": {"max_iter": 4.0},
    "nearswap": {"t": 0.02},
    "passthrough": {"scale": 0.5},
    "model_stock": {},
    "arcee_fusion": {},
    "sce": {"select_topk": 0.6},
    "ram": {},
    "ramplus_tl": {"r": 0.2},
    "task_arithmetic": {"weight": {"base": 0.1, "law": 0.5, "code": -0.2}},
    "ties": {"weight": 0.5, "density": 0.4, "lambda": 0.7},
    "dare_linear": {"weight": 0.3, "density": 0.5},
    "dare_ties": {"weight": 0.3, "density": {"base": 0.2, "law": 0.5, "code": 1.0}},
    "breadcrumbs": {"weight": 0.3, "density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"weight": 0.3, "density": 0.5},
    "della": {"weight": 0.3, "density": 0.5, "epsilon": 0.1},
    "della_linear": {"weight": 0.3, "density": 0.5},
}
COUNTS = {"slerp": 1, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1, "nuslerp": 2}
METHODS = sorted(PARAMETERS)
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def models(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = {"w": (5, 8), "same_shape": (5, 8), "norm": (8,)}
    base = {key: draw(*shape) for key, shape in shapes.items()}
    finetunes = {
        name: {key: (tensor + 0.1 * draw(*tensor.shape)).to(dtype) for key, tensor in base.items()}
        for name in NAMES
    }
    return {key: tensor.to(dtype) for key, tensor in base.items()}, finetunes


def of(method: str) -> tuple[Merging, list[str]]:
    return Merging(method=method, parameters=PARAMETERS[method]), list(
        NAMES[: COUNTS.get(method, len(NAMES))]
    )


def test_every_method_is_tested() -> None:
    assert {method.spec.name for method in registered_methods()} == set(PARAMETERS)


def test_soup_is_the_mean() -> None:
    _, finetunes = models()
    merged = soup(finetunes, everything)
    for key, tensor in merged.items():
        mean = torch.stack([finetune[key] for finetune in finetunes.values()]).mean(0)
        torch.testing.assert_close(tensor, mean)


def test_task_arithmetic_adds_task_vectors() -> None:
    base, finetunes = models()
    merged = task_arithmetic(base, finetunes, 0.3, lambda name: name == "w")
    assert list(merged) == ["w"]
    vectors = sum(finetune["w"] - base["w"] for finetune in finetunes.values())
    torch.testing.assert_close(merged["w"], base["w"] + 0.3 * vectors)


@pytest.mark.parametrize("method", METHODS)
def test_streaming_gives_what_mergekit_gives_whole_models(method: str) -> None:
    base, finetunes = models()
    merging, names = of(method)
    chosen = {name: finetunes[name] for name in names}
    ours = merged(base, chosen, merging, everything, seed=3)
    role, inputs = roles(method, names)
    everyone = {BASE: base, **chosen}
    whole = {name: everyone[name] for name in inputs}
    keys = [[key] for key in base] if method in RANDOM else [list(base)]
    for part in keys:
        torch.manual_seed(tensor_seed(3, part[0]))
        theirs = merge_state_dicts(
            {name: {key: model[key] for key in part} for name, model in whole.items()},
            method,
            base=role,
            parameters=merging.parameters,
        )
        for key in part:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    assert not all(torch.equal(ours[key], base[key]) for key in base)


@pytest.mark.parametrize("method", METHODS)
def test_merges_in_fp32_and_gives_the_dtype_of_the_base(method: str) -> None:
    base, finetunes = models(torch.bfloat16)
    merging, names = of(method)
    chosen = {name: finetunes[name] for name in names}
    wide = [{key: tensor.float() for key, tensor in model.items()} for model in chosen.values()]
    exact = merged(
        {key: tensor.float() for key, tensor in base.items()},
        dict(zip(names, wide, strict=True)),
        merging,
        everything,
    )
    for key, tensor in merged(base, chosen, merging, everything).items():
        assert torch.equal(tensor, exact[key].to(torch.bfloat16))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("passthrough", "linear")])
def test_finetunes_that_are_the_base_merge_into_it(method: str) -> None:
    base, _ = models()
    merging, names = of(method)
    result = merged(base, dict.fromkeys(names, base), merging, everything)
    for key, tensor in result.items():
        torch.testing.assert_close(tensor, base[key])


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_take_the_seed_and_leave_the_global_generator(method: str) -> None:
    base, finetunes = models()
    merging, _ = of(method)
    for tensors in (base, *finetunes.values()):
        tensors["same_shape"] = tensors["w"]
    before = torch.get_rng_state()
    one, same = (merged(base, finetunes, merging, everything, seed=5) for _ in range(2))
    other = merged(base, finetunes, merging, everything, seed=6)
    alone = merged(base, finetunes, merging, lambda name: name == "norm", seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in base)
    assert not all(torch.equal(one[key], other[key]) for key in base)
    assert torch.equal(alone["norm"], one["norm"])
    assert not torch.equal(one["w"], one["same_shape"])


def test_only_one_tensor_of_each_model_is_read_at_a_time() -> None:
    base, finetunes = models()
    read: list[str] = []

    class Noted(dict[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            read.append(key)
            return super().__getitem__(key)

    lazy = {name: Noted(tensors) for name, tensors in finetunes.items()}
    merging, _ = of("ties")
    stream = streamed(Noted(base), lazy, merging, list(base))
    for number, (key, _) in enumerate(stream, 1):
        assert read[-4:] == [key] * 4
        assert len(read) == 4 * number


def test_integers_are_kept_if_equal_and_refused_if_not() -> None:
    base, finetunes = models()
    merging, _ = of("task_arithmetic")
    for tensors in (base, *finetunes.values()):
        tensors["steps"] = torch.tensor([3])
    assert merged(base, finetunes, merging, everything)["steps"].tolist() == [3]
    finetunes["law"]["steps"] = torch.tensor([4])
    with pytest.raises(InputError, match="equal integers in steps"):
        merged(base, finetunes, merging, everything)


REFUSALS = [
    ("slerp", {"t": 0.5}, 3, r"slerp cannot merge 3 finetunes .*exactly 2 inputs"),
    ("nearswap", {"t": 0.5}, 3, "exactly 2"),
    ("arcee_fusion", {}, 3, "exactly 2"),
    ("nuslerp", {"weight": 1.0}, 3, "exactly 2 non-base"),
    ("passthrough", {}, 2, "at most 1|exactly 1"),
    ("model_stock", {}, 1, "at least 3"),
    ("ties", {"weight": 1.0, "densty": 0.5}, 3, "no parameter densty; it has .*density"),
    ("ties", {}, 3, "ties needs the parameter weight"),
    ("ties", {"weight": {"law": 1.0}}, 3, "but base is an expert without a value"),
    ("ties", {"weight": dict.fromkeys((*NAMES, "x"), 1.0)}, 3, "but x is no expert"),
    ("ties", {"weight": 1.0, "lambda": {"law": 1.0}}, 3, "one value for the whole merge"),
    ("ties", {"weight": 1.0, "density": 0.0}, 3, "above 0 and at most 1"),
    ("ties", {"weight": math.inf}, 3, "finite"),
    ("karcher", {"max_iter": 2.5}, 3, "max_iter is 2.5"),
    ("linear", {"weight": {"base": 1.0, "law": -1.0, "code": 0.0}}, 3, "sum of its weights"),
    ("della", {"weight": 1.0, "density": 0.9}, 3, "lower epsilon"),
]


@pytest.mark.parametrize(("method", "parameters", "count", "message"), REFUSALS)
def test_refused_before_any_work(
    method: str, parameters: Mapping[str, Any], count: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_merging(Merging(method=method, parameters=dict(parameters)), NAMES[:count])


def test_two_finetunes_are_the_ends_of_a_method_between_two_models() -> None:
    base, finetunes = models()
    two = {name: finetunes[name] for name in ("law", "code")}
    result = merged(base, two, Merging(method="slerp", parameters={"t": 0.0}), everything)
    for key in base:
        torch.testing.assert_close(result[key], finetunes["law"][key])


@pytest.mark.parametrize("method", METHODS)
def test_large_matrices_are_merged_in_blocks_where_that_is_the_same(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only methods that take every place by itself; random ones draw for a whole matrix."""
    merging, names = of(method)
    base, all_finetunes = models(torch.bfloat16)
    finetunes = {name: all_finetunes[name] for name in names}
    whole = dict(streamed(base, finetunes, merging, ["w"], exact=["w"]))
    sizes: list[int] = []
    plain = streaming.merge_one

    def noted(tensors: Any, *more: Any) -> Tensor:
        sizes.append(len(next(iter(tensors.values()))))
        return plain(tensors, *more)

    monkeypatch.setattr(streaming, "BLOCK", 16)
    monkeypatch.setattr(streaming, "merge_one", noted)
    again = dict(streamed(base, finetunes, merging, ["w"], exact=["w"]))
    assert torch.equal(again["w"], whole["w"])
    if method in ("linear", "task_arithmetic"):
        assert sizes[-3:] == [2, 2, 1]
    if method in (*RANDOM, "ties", "sce", "model_stock"):
        assert sizes[-1] == 5


@pytest.mark.parametrize("method", METHODS)
def test_all_of_mergekits_methods_keep_zeros(method: str) -> None:
    merging, names = of(method)
    assert keeps_zeros(merging, names)


def test_a_method_that_breaks_zeros_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(group: TensorGroup) -> Tensor:
        return group.entries[0].tensor + 1

    shifted.__annotations__ = {"group": TensorGroup, "return": Tensor}
    monkeypatch.setitem(registry._METHODS, "shifted", merge_method(shifted, name="shifted"))
    assert get("shifted").spec.name == "shifted"
    assert not keeps_zeros(Merging(method="shifted"), NAMES)


def test_coefficients_of_linear_methods() -> None:
    weights = {"base": 0.1, "law": 0.5, "code": -0.2}
    summed = Merging(method="task_arithmetic", parameters={"weight": weights, "lambda": 2.0})
    assert coefficients(summed, NAMES) == pytest.approx({n: 2 * w for n, w in weights.items()})
    mean = Merging(method="linear", parameters={"weight": 1.0})
    assert coefficients(mean, NAMES) == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
    for method in ("ties", "dare_linear", "sce", "model_stock", "karcher", "della"):
        with pytest.raises(InputError, match="multiples of the task vectors"):
            coefficients(of(method)[0], NAMES)
    unequal = Merging(method="linear", parameters={"weight": 1.0, "normalize": False})
    with pytest.raises(InputError, match="multiples of the task vectors"):
        coefficients(unequal, NAMES)


def test_normalised_weights_do_not_matter_if_all_are_the_same() -> None:
    assert depends_on_weight(Merging(method="task_arithmetic"), NAMES)
    assert not depends_on_weight(Merging(method="ties"), NAMES)
