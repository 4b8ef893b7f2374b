"""Merges of dense finetunes, made by mergekit in memory."""

from collections.abc import Callable, Mapping
from typing import Any

from mergekit.merge_methods import merge_state_dicts
from torch import Tensor

from moiety.compose.recipe import Merging

BASE = "<base>"
"""Cannot collide with the name of a finetune."""


def soup(
    finetunes: Mapping[str, Mapping[str, Tensor]], keep: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The average of the finetunes (Wortsman et al. 2022, arXiv:2203.05482).

    Only tensors whose name `keep` accepts are merged.
    """
    chosen = {name: _chosen(tensors, keep) for name, tensors in finetunes.items()}
    weight = dict.fromkeys(chosen, 1 / len(chosen))
    return _merge(chosen, "linear", {"weight": weight})


def task_arithmetic(
    base: Mapping[str, Tensor],
    finetunes: Mapping[str, Mapping[str, Tensor]],
    weight: float,
    keep: Callable[[str], bool],
) -> dict[str, Tensor]:
    """`base + weight · Σ (finetune - base)` (Ilharco et al. 2022, arXiv:2212.04089)."""
    chosen = {name: _chosen(tensors, keep) for name, tensors in finetunes.items()}
    weights = dict.fromkeys(chosen, weight)
    models = {BASE: _chosen(base, keep), **chosen}
    return _merge(models, "task_arithmetic", {"weight": weights}, base=BASE)


def merged(
    base: Mapping[str, Tensor],
    finetunes: Mapping[str, Mapping[str, Tensor]],
    merging: Merging,
    keep: Callable[[str], bool],
) -> dict[str, Tensor]:
    """The finetunes merged by any of mergekit's methods; a task-vector method gets the base."""
    models = {name: _chosen(tensors, keep) for name, tensors in finetunes.items()}
    models[BASE] = _chosen(base, keep)
    return _merge(models, merging.method, dict(merging.parameters), base=BASE)


def _chosen(tensors: Mapping[str, Tensor], keep: Callable[[str], bool]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in tensors if keep(name)}


def _merge(models: Mapping[Any, Any], method: str, parameters: Any, **options: Any) -> Any:
    return merge_state_dicts(models, method, parameters=parameters, **options)


def everything(name: str) -> bool:
    """Keep every tensor: a whole merged model."""
    return True
