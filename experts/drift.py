"""How far finetunes moved away from their base, and whether they moved the same way.

N rows: the base and the task vectors (finetune minus base) of the finetunes; S weights of a slice.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from moiety.experts.anatomy import GROUPS, group_of
from moiety.progress import SILENT, Progress

ALL = "all"
SLICE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class GroupDrift:
    """One part of a finetune against the base's.

    `relative` is the Frobenius norm of the task vector over that of the base (None where the base
    is zero); `equal_tensors` of `tensors` are the same bit by bit, and the share `unchanged` of
    single weights is equal.
    """

    group: str
    tensors: int
    equal_tensors: int
    unchanged: float
    relative: float | None


@dataclass(frozen=True, kw_only=True)
class ModelDrift:
    """One finetune against the base, by group and over `all`.

    Tensors that cannot be compared are named: `absent` from the finetune, `added` by it, or
    `reshaped`, with the base's and its own shape.
    """

    model: str
    groups: list[GroupDrift]
    absent: list[str]
    added: list[str]
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Cosine between the task vectors of two finetunes in a group; None where one is zero."""

    first: str
    second: str
    group: str
    cosine: float | None


@dataclass(frozen=True, kw_only=True)
class Drift:
    """All finetunes against one base."""

    base: str
    models: list[ModelDrift]
    agreements: list[Agreement]


@dataclass
class _Sums:
    """Running sums of one group: of one finetune, or of a pair of them."""

    tensors: int = 0
    equal: int = 0
    weights: int = 0
    unchanged: int = 0
    base: float = 0.0
    first: float = 0.0
    second: float = 0.0
    product: float = 0.0


@dataclass
class _Tally:
    """What is known of all finetunes so far, by finetune (or pair) and group."""

    single: dict[tuple[int, str], _Sums] = field(default_factory=lambda: defaultdict(_Sums))
    paired: dict[tuple[int, int, str], _Sums] = field(default_factory=lambda: defaultdict(_Sums))
    reshaped: dict[int, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = field(
        default_factory=lambda: defaultdict(list)
    )


def drift(
    base: tuple[str, Mapping[str, Tensor]],
    models: Sequence[tuple[str, Mapping[str, Tensor]]],
    progress: Progress = SILENT,
) -> Drift:
    """Compare finetunes with their base, each a name and its dense tensors.

    One tensor of every model is in memory at a time. Task vectors are fp32, sums over slices of
    them fp64.
    """
    base_name, base_tensors = base
    tally = _Tally()
    for name in progress.track(base_tensors, "compare with base", len(base_tensors)):
        tensor = base_tensors[name]
        held = {index: own[name] for index, (_, own) in enumerate(models) if name in own}
        for index in [index for index, own in held.items() if own.shape != tensor.shape]:
            tally.reshaped[index].append((name, tuple(tensor.shape), tuple(held.pop(index).shape)))
        _add(tally, group_of(name), tensor, held)
    return Drift(
        base=base_name,
        models=[
            _model_drift(tally, index, name, base_tensors, own)
            for index, (name, own) in enumerate(models)
        ],
        agreements=list(_agreements(tally, [name for name, _ in models])),
    )


def _add(tally: _Tally, group: str, base: Tensor, held: Mapping[int, Tensor]) -> None:
    order = list(held)
    gram_NN = torch.zeros(len(order) + 1, len(order) + 1, dtype=torch.float64)
    unchanged_N = torch.zeros(len(order) + 1, dtype=torch.int64)
    for rows_NS in _slices(base, [held[index] for index in order]):
        gram_NN += (rows_NS @ rows_NS.T).double()
        unchanged_N += (rows_NS == 0).sum(-1)
    gram = gram_NN.tolist()
    for row, index in enumerate(order, start=1):
        for name in (group, ALL):
            sums = tally.single[index, name]
            sums.tensors += 1
            sums.equal += _same_bits(base, held[index])
            sums.weights += base.numel()
            sums.unchanged += int(unchanged_N[row])
            sums.base += gram[0][0]
            sums.first += gram[row][row]
    for (one, first), (other, second) in combinations(enumerate(order, start=1), 2):
        for name in (group, ALL):
            sums = tally.paired[first, second, name]
            sums.first += gram[one][one]
            sums.second += gram[other][other]
            sums.product += gram[one][other]


def _slices(base: Tensor, finetunes: Sequence[Tensor]) -> Iterator[Tensor]:
    """The base and the task vectors (N, S), SLICE weights at a time."""
    flat_base, flat = base.flatten(), [tensor.flatten() for tensor in finetunes]
    for start in range(0, len(flat_base), SLICE):
        base_S = flat_base[start : start + SLICE].float()
        yield torch.stack([base_S, *(own[start : start + SLICE].float() - base_S for own in flat)])


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype:
        return False
    return one.flatten().view(torch.uint8).equal(other.flatten().view(torch.uint8))


def _model_drift(
    tally: _Tally, index: int, name: str, base: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> ModelDrift:
    groups = [
        GroupDrift(
            group=group,
            tensors=sums.tensors,
            equal_tensors=sums.equal,
            unchanged=sums.unchanged / max(1, sums.weights),
            relative=math.sqrt(sums.first / sums.base) if sums.base else None,
        )
        for group in (*GROUPS, ALL)
        if (sums := tally.single.get((index, group))) is not None
    ]
    return ModelDrift(
        model=name,
        groups=groups,
        absent=sorted(set(base) - set(own)),
        added=sorted(set(own) - set(base)),
        reshaped=tally.reshaped[index],
    )


def _agreements(tally: _Tally, names: Sequence[str]) -> Iterator[Agreement]:
    for first, second in combinations(range(len(names)), 2):
        for group in (*GROUPS, ALL):
            sums = tally.paired.get((first, second, group))
            if sums is not None:
                length = math.sqrt(sums.first) * math.sqrt(sums.second)
                yield Agreement(
                    first=names[first],
                    second=names[second],
                    group=group,
                    cosine=sums.product / length if length else None,
                )
