"""What each gate sees, in the memory of one Gram matrix: enough to fit it in closed form.

W windows, C context length, T tokens (W x C flattened), D model width, E experts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.progress import SILENT, Progress
from moiety.routers.gates import Gate, Route, forced, one_hot, watched
from moiety.routers.passes import check_domains, evaluating, run_decoder
from moiety.text import Windows


@dataclass(frozen=True, kw_only=True)
class GateStatistics:
    """Sums over the true inputs x of one gate, each token labelled with its domain's own expert.

    A token of label e weighs 1 / n_e, n_e being the tokens of that label, so that every label
    counts the same however much text it has: `gram_DD` is the sum of x xᵀ / n_e, `sum_ED` row e
    the sum of x / n_e (the mean input of label e), fp32 both; `count_E` holds n_e, int64.
    """

    name: str
    layer: int
    gram_DD: Tensor
    sum_ED: Tensor
    count_E: Tensor


def collect(
    model: nn.Module,
    gates: Sequence[Gate],
    data: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    *,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> list[GateStatistics]:
    """One pass over calibration text; padding is left out.

    Each domain's tokens go to its own expert in every layer (teacher forcing), so that deeper
    gates see the states they will see when the routing is right. The order of the domains and
    the batch size change nothing but float rounding. Raises InputError for a domain without an
    own expert or text, and for NaN or infinite inputs, naming the gate and the domain.
    """
    check_domains(data, own_expert, gates)
    tokens: Counter[int] = Counter()
    for domain, windows in data.items():
        tokens[own_expert[domain]] += int(windows.mask_WC.sum())
    sums = [_Sums.empty(gate) for gate in gates]
    with evaluating(model):
        for domain, windows in data.items():
            label = own_expert[domain]
            _pass(model, gates, sums, windows, label, tokens[label], batch_size, progress, domain)
            _check_finite(gates, sums, domain)
    return [
        _statistics(gate, gate_sums, tokens) for gate, gate_sums in zip(gates, sums, strict=True)
    ]


def merge(
    first: Sequence[GateStatistics], second: Sequence[GateStatistics]
) -> list[GateStatistics]:
    """Statistics of two passes over different labels as those of one pass over both.

    Adding a domain so costs a pass over that domain only. Raises InputError when the two are of
    different gates, or share a label: its mean cannot be taken out of the sum again, so all text
    of one label has to be in one pass.
    """
    if [_identity(one) for one in first] != [_identity(other) for other in second]:
        raise InputError("expected statistics of the same gates, but their names or shapes differ")
    return [_merge_gate(one, other) for one, other in zip(first, second, strict=True)]


def _identity(statistics: GateStatistics) -> tuple[str, int, torch.Size]:
    return statistics.name, statistics.layer, statistics.sum_ED.shape


def _merge_gate(one: GateStatistics, other: GateStatistics) -> GateStatistics:
    shared = ((one.count_E > 0) & (other.count_E > 0)).nonzero().flatten().tolist()
    if shared:
        raise InputError(
            f"expected statistics of different experts, but both hold text of expert {shared[0]}; "
            "collect all its text in one pass"
        )
    return GateStatistics(
        name=one.name,
        layer=one.layer,
        gram_DD=one.gram_DD + other.gram_DD,
        sum_ED=one.sum_ED + other.sum_ED,
        count_E=one.count_E + other.count_E,
    )


@dataclass(frozen=True)
class _Sums:
    gram_DD: Tensor
    sum_ED: Tensor

    @classmethod
    def empty(cls, gate: Gate) -> "_Sums":
        weight_ED = cast(Tensor, gate.module.weight)
        experts, width = weight_ED.shape
        zeros = torch.zeros((width, width), device=weight_ED.device)
        return cls(zeros, torch.zeros((experts, width), device=weight_ED.device))

    def add(self, hidden_TD: Tensor, label: int, total: int) -> None:
        hidden_TD = hidden_TD.detach().float()
        self.gram_DD.addmm_(hidden_TD.T, hidden_TD, alpha=1 / total)
        self.sum_ED[label] += hidden_TD.sum(0) / total


def _pass(
    model: nn.Module,
    gates: Sequence[Gate],
    sums: Sequence[_Sums],
    windows: Windows,
    label: int,
    total: int,
    batch_size: int,
    progress: Progress,
    domain: str,
) -> None:
    batches = progress.track(
        windows.batches(batch_size), f"gate inputs of {domain}", -(-len(windows) // batch_size)
    )
    for batch in batches:
        kept_T = batch.mask_WC.flatten().bool()

        def listen(route: Route, kept_T: Tensor = kept_T) -> None:
            hidden_TD = route.hidden_TD[kept_T.to(route.hidden_TD.device)]
            sums[route.layer].add(hidden_TD, label, total)

        with forced(gates, one_hot(label)), watched(gates, listen):
            run_decoder(model, batch)


def _check_finite(gates: Sequence[Gate], sums: Sequence[_Sums], domain: str) -> None:
    for gate, gate_sums in zip(gates, sums, strict=True):
        if not bool(gate_sums.gram_DD.isfinite().all()):
            raise InputError(
                f"expected finite inputs of {gate.name}, but text of {domain!r} gives NaN or "
                "infinite values there; check the weights of the layers before it"
            )


def _statistics(gate: Gate, sums: _Sums, tokens: Mapping[int, int]) -> GateStatistics:
    counts = [tokens.get(expert, 0) for expert in range(gate.experts)]
    return GateStatistics(
        name=gate.name,
        layer=gate.layer,
        gram_DD=sums.gram_DD,
        sum_ED=sums.sum_ED,
        count_E=torch.tensor(counts, device=sums.sum_ED.device),
    )
