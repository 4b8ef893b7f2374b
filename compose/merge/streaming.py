"""Merge by mergekit's methods in memory, tensor by tensor, in fp32 and by a seed."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from mergekit.merge_methods import merge_tensors
from torch import Tensor

from moiety.compose.merge.checks import check_merging
from moiety.compose.merge.roles import BASE, roles
from moiety.compose.recipe import Merging
from moiety.errors import InputError
from moiety.files import digest

BLOCK = 1 << 22
"""Numbers of each model that are widened at once where a method takes every place by itself."""


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
    is_elementwise = functools.cache(lambda: _is_elementwise(merging, list(finetunes)))
    for name in names:
        tensors = {BASE: base[name], **{own: ft[name] for own, ft in finetunes.items()}}
        dtype = None if name in exact else tensors[BASE].dtype
        if _is_large(tensors) and is_elementwise():
            yield name, _in_blocks(tensors, merging, name, dtype)
        else:
            result = merge_one(tensors, merging, name, seed)
            yield name, result if dtype is None else result.to(dtype)


def _is_large(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all are matrices of one shape with more than `BLOCK` floating-point numbers."""
    first, *others = tensors.values()
    alike = all(other.shape == first.shape for other in others)
    return alike and first.is_floating_point() and first.ndim > 1 and first.numel() > BLOCK


def _in_blocks(
    tensors: Mapping[str, Tensor], merging: Merging, name: str, dtype: torch.dtype | None
) -> Tensor:
    """A merge some rows at a time, so that only those of every model are widened at once."""
    whole = tensors[BASE]
    result = torch.empty(whole.shape, dtype=dtype or _wide(tensors.values()))
    rows = max(1, BLOCK // whole[0].numel())
    for start in range(0, len(whole), rows):
        block = {own: tensor[start : start + rows] for own, tensor in tensors.items()}
        result[start : start + rows] = merge_one(block, merging, name)
    return result


def _is_elementwise(merging: Merging, finetunes: Sequence[str]) -> bool:
    """Whether rows can be merged apart: no number of the result hangs on another place's."""
    generator = torch.Generator().manual_seed(0)
    names, shape = (BASE, *finetunes), (8, 16)
    whole = {name: torch.randn(shape, generator=generator) for name in names}
    each = [{name: tensor[row : row + 1] for name, tensor in whole.items()} for row in range(8)]
    rows = [merge_one(tensors, merging, "probe") for tensors in each]
    return torch.equal(torch.cat(rows), merge_one(whole, merging, "probe"))


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
