"""Merge by mergekit's methods in memory, tensor by tensor, in fp32 and by a seed."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from mergekit.merge_methods import merge_tensors
from torch import Tensor

from moiety.compose.merge.checks import check_merging
from moiety.compose.merge.roles import BASE, roles
from moiety.compose.recipe import Merging
from moiety.errors import InputError
from moiety.files import digest


def soup(
    finetunes: Mapping[str, Mapping[str, Tensor]], keep: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The average of the finetunes (Wortsman et al. 2022, arXiv:2203.05482).

    Only tensors whose name `keep` accepts are merged; they come in the first finetune's dtype.
    """
    mean = Merging(method="linear", parameters={"weight": 1 / len(finetunes)})
    return merged(next(iter(finetunes.values())), finetunes, mean, keep)


def task_arithmetic(
    base: Mapping[str, Tensor],
    finetunes: Mapping[str, Mapping[str, Tensor]],
    weight: float,
    keep: Callable[[str], bool],
) -> dict[str, Tensor]:
    """`base + weight · Σ (finetune - base)` (Ilharco et al. 2022, arXiv:2212.04089)."""
    merging = Merging(method="task_arithmetic", parameters={"weight": weight})
    return merged(base, finetunes, merging, keep)


def merged(
    base: Mapping[str, Tensor],
    finetunes: Mapping[str, Mapping[str, Tensor]],
    merging: Merging,
    keep: Callable[[str], bool],
    seed: int = 0,
) -> dict[str, Tensor]:
    """The tensors whose name `keep` accepts, merged by any of mergekit's methods.

    They come in the base's dtype. Raises InputError when the method does not take these
    finetunes or parameters.
    """
    names = [name for name in base if keep(name)]
    return dict(streamed(base, finetunes, merging, names, seed))


def streamed(
    base: Mapping[str, Tensor],
    finetunes: Mapping[str, Mapping[str, Tensor]],
    merging: Merging,
    names: Iterable[str],
    seed: int = 0,
    exact: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Merged tensors by name, each made when it is asked for, in the base's dtype.

    Those in `exact` stay in the dtype they are merged in (fp32 or wider).
    """
    check_merging(merging, list(finetunes))
    for name in names:
        tensors = {BASE: base[name], **{own: ft[name] for own, ft in finetunes.items()}}
        result = merge_one(tensors, merging, name, seed)
        yield name, result if name in exact else result.to(tensors[BASE].dtype)


@torch.no_grad()
def merge_one(tensors: Mapping[str, Tensor], merging: Merging, name: str, seed: int = 0) -> Tensor:
    """One merged tensor in fp32 (fp64 where an input is), from those of BASE and each finetune.

    mergekit draws random numbers from torch's global generator, which is seeded here by `seed`
    and the tensor's `name` and put back afterwards, so that a tensor never depends on the ones
    before it. A tensor that no finetune changed stays as it is. Raises InputError when shapes
    differ, integers differ, or the method fails.
    """
    base, inputs = roles(merging.method, [own for own in tensors if own != BASE])
    first = tensors[base or inputs[0]]
    if not first.is_floating_point():
        if all(torch.equal(first, tensors[one]) for one in inputs):
            return first
        raise InputError(f"expected equal integers in {name} of all models, but they differ")
    if base is not None and all(torch.equal(first, tensors[one]) for one in inputs):
        return first.to(_wide([first]))
    values = [tensors[one] for one in inputs]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(tensor_seed(seed, name))
            result = merge_tensors(
                values,
                merging.method,
                parameters=merging.parameters,
                ids=inputs,
                base_index=None if base is None else inputs.index(base),
                name=name,
                dtype=_wide(values),
            )
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{merging.method} cannot merge {name}: {error}") from error
    if not bool(result.isfinite().all()):
        raise InputError(
            f"expected finite weights from {merging.method}, but {name} has some that are not; "
            "check its parameters and the finetunes"
        )
    return result


def tensor_seed(seed: int, name: str) -> int:
    """The seed of one tensor's random choices."""
    return int(digest({"seed": seed, "tensor": name}), 16) >> 1


def _wide(tensors: Iterable[Tensor]) -> torch.dtype:
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def everything(name: str) -> bool:
    """Keep every tensor: a whole merged model."""
    return True
