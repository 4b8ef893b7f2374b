"""What each gate sees, in the memory of one Gram matrix: enough to fit it in closed form.

B windows, C context length, T tokens (B x C flattened), D model width, W features of a gate
(D, or more for one with contexts), E experts, N sampled tokens.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from moiety.errors import InputError
from moiety.progress import SILENT, Progress
from moiety.routers.gates import Gate, Route, forced, per_token, watched
from moiety.routers.labelled import LabelledText, of_domain, stitched
from moiety.routers.passes import check_domains, evaluating, run_decoder
from moiety.text import Windows


@dataclass(frozen=True, kw_only=True)
class GateStatistics:
    """Sums over the features x of one gate, each token labelled with its own expert.

    A token of label e weighs 1 / n_e, n_e being the tokens of that label, so that every label
    counts the same however much text it has: `gram_WW` is the sum of x xᵀ / n_e, `sum_EW` row e
    the sum of x / n_e (the mean features of label e), fp32 both; `count_E` holds n_e, int64.
    `sample_NW` are features of some tokens, fp32, and `label_N` their labels; both may be empty.
    """

    name: str
    layer: int
    gram_WW: Tensor
    sum_EW: Tensor
    count_E: Tensor
    sample_NW: Tensor
    label_N: Tensor


def collect(
    model: nn.Module,
    gates: Sequence[Gate],
    data: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    *,
    only: Collection[str] | None = None,
    stitch: float = 0.5,
    shortest: int = 32,
    tokens: int | None = None,
    sample: int = 0,
    own_routes: bool = True,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> list[GateStatistics]:
    """One pass over calibration text for every domain, or for those of `only`; no padding.

    Each token goes to its own expert in every layer (teacher forcing), so that deeper gates see
    the states they will see when the routing is right; without `own_routes` it goes where the
    gates send it. A domain's pass reads its windows and `stitch` times as many that switch
    between it and the others (`labelled.stitched`, segments from `shortest` tokens), where only
    tokens of its expert count: a gate that looks back has to see text that changes, and other
    domains matter as context only. `tokens` is how many a label has in the sums at most, `sample`
    how many in the sample, both evenly spread over its text (a context changes slowly, so that
    neighbours tell little more than one of them); more windows than hold `tokens` are not read. The order of the domains and the batch size change nothing but float
    rounding. Raises InputError for a domain without an own expert or text, stitching without a
    second expert, and NaN or infinite features, naming the gate and the domain.
    """
    check_domains(data, own_expert, gates)
    counted = _counted(data, only)
    texts = {
        domain: _texts(data, own_expert, domain, tokens, stitch, shortest, seed)
        for domain in counted
    }
    labels = {own_expert[domain]: _Label(own_expert[domain], tokens, sample) for domain in counted}
    for domain, parts in texts.items():
        label = labels[own_expert[domain]]
        label.text += sum(label.tokens(part) for part in parts)
    sums = [_Sums.empty(gate) for gate in gates]
    with evaluating(model):
        for domain, parts in texts.items():
            batches = [batch for part in parts for batch in part.batches(batch_size)]
            for batch in progress.track(batches, f"gate inputs of {domain}", len(batches)):
                _add(model, gates, sums, batch, labels[own_expert[domain]], own_routes=own_routes)
            _check_finite(gates, sums, domain)
    return [
        _statistics(gate, gate_sums, labels) for gate, gate_sums in zip(gates, sums, strict=True)
    ]


def enough(windows: Windows, tokens: int | None) -> Windows:
    """The windows of a domain that `collect` reads: as few as hold `tokens`, evenly spread."""
    held = int(windows.mask_WC.sum())
    if tokens is None or held <= tokens:
        return windows
    chosen = math.ceil(tokens * len(windows) / held)
    return windows.select(_spread(0, len(windows), chosen, len(windows)))


def stitched_windows(windows: Windows, tokens: int | None, stitch: float) -> int:
    """How many stitched windows `collect` reads beside a domain's own."""
    return math.ceil(stitch * len(enough(windows, tokens)))


def merge(
    first: Sequence[GateStatistics], second: Sequence[GateStatistics]
) -> list[GateStatistics]:
    """Statistics of two passes over different labels as those of one pass over both.

    Adding a domain so costs a pass over that domain only; the later statistics may know more
    experts than the earlier ones. Raises InputError when the two are of different gates, or
    share a label: its mean cannot be taken out of the sum again, so all text of one label has to
    be in one pass.
    """
    if [_identity(one) for one in first] != [_identity(other) for other in second]:
        raise InputError("expected statistics of the same gates, but their names or shapes differ")
    return [_merge_gate(one, other) for one, other in zip(first, second, strict=True)]


def _identity(statistics: GateStatistics) -> tuple[str, int, torch.Size]:
    return statistics.name, statistics.layer, statistics.gram_WW.shape


def _merge_gate(one: GateStatistics, other: GateStatistics) -> GateStatistics:
    experts = max(len(one.count_E), len(other.count_E))
    one_E, other_E = (pad(each.count_E, (0, experts - len(each.count_E))) for each in (one, other))
    shared = ((one_E > 0) & (other_E > 0)).nonzero().flatten().tolist()
    if shared:
        raise InputError(
            f"expected statistics of different experts, but both hold text of expert {shared[0]}; "
            "collect all its text in one pass"
        )
    one_EW, other_EW = (
        pad(each.sum_EW, (0, 0, 0, experts - len(each.count_E))) for each in (one, other)
    )
    return GateStatistics(
        name=one.name,
        layer=one.layer,
        gram_WW=one.gram_WW + other.gram_WW,
        sum_EW=one_EW + other_EW,
        count_E=one_E + other_E,
        sample_NW=torch.cat([one.sample_NW, other.sample_NW]),
        label_N=torch.cat([one.label_N, other.label_N]),
    )


def _counted(data: Mapping[str, Windows], only: Collection[str] | None) -> list[str]:
    strange = sorted(set(only or ()) - set(data))
    if strange:
        raise InputError(
            f"expected only to name domains with text, {sorted(data)}, but it names {strange[0]!r}"
        )
    return [domain for domain in data if only is None or domain in only]


def _texts(
    data: Mapping[str, Windows],
    own_expert: Mapping[str, int],
    domain: str,
    tokens: int | None,
    stitch: float,
    shortest: int,
    seed: int,
) -> list[LabelledText]:
    pure = of_domain(enough(data[domain], tokens), own_expert[domain])
    count = stitched_windows(data[domain], tokens, stitch)
    if count == 0:
        return [pure]
    return [pure, stitched(data, own_expert, count, seed, shortest, around=domain)]


@dataclass
class _Label:
    """One own expert: its tokens in all and those read so far, those that count among them."""

    expert: int
    most: int | None
    sample: int
    text: int = 0
    read: int = 0
    counted: int = 0

    @property
    def total(self) -> int:
        """Tokens that count when all has been read."""
        return self.text if self.most is None else min(self.most, self.text)

    def tokens(self, text: LabelledText) -> int:
        return int((text.own_WC == self.expert).sum())

    def take(self, text: LabelledText) -> tuple[Tensor, Tensor]:
        """The rows of a batch's tokens that count, and which of those are sampled."""
        row_T = (text.own_WC.flatten() == self.expert).nonzero().flatten()
        row_T = row_T[_spread(self.read, len(row_T), self.total, self.text)]
        sampled_T = _spread(self.counted, len(row_T), min(self.sample, self.total), self.total)
        self.read += int((text.own_WC == self.expert).sum())
        self.counted += len(row_T)
        return row_T, sampled_T


def _spread(start: int, count: int, chosen: int, total: int) -> Tensor:
    """Which of the next `count` of `total` things are among `chosen` evenly spread ones."""
    place_T = torch.arange(start, start + count)
    taken_T = (place_T + 1) * chosen // max(total, 1) > place_T * chosen // max(total, 1)
    return taken_T.nonzero().flatten()


@dataclass(frozen=True)
class _Sums:
    gram_WW: Tensor
    sum_EW: Tensor
    sample: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, gate: Gate) -> "_Sums":
        weight_EW = cast(Tensor, gate.module.weight)
        experts, width = weight_EW.shape
        zeros_WW = torch.zeros((width, width), device=weight_EW.device)
        return cls(zeros_WW, torch.zeros((experts, width), device=weight_EW.device))

    def add(self, features_TW: Tensor, row_T: Tensor, sampled_T: Tensor, label: _Label) -> None:
        counted_TW = features_TW.detach()[row_T.to(features_TW.device)]
        self.gram_WW.addmm_(counted_TW.T, counted_TW, alpha=1 / label.total)
        self.sum_EW[label.expert] += counted_TW.sum(0) / label.total
        if len(sampled_T) > 0:
            self.sample.append(counted_TW[sampled_T.to(counted_TW.device)].cpu())
            self.labels.append(torch.full((len(sampled_T),), label.expert))


def _add(
    model: nn.Module,
    gates: Sequence[Gate],
    sums: Sequence[_Sums],
    batch: LabelledText,
    label: _Label,
    *,
    own_routes: bool,
) -> None:
    row_T, sampled_T = label.take(batch)

    def listen(route: Route) -> None:
        sums[route.layer].add(route.features_TW, row_T, sampled_T, label)

    with forced(gates if own_routes else (), per_token(batch.own_WC)), watched(gates, listen):
        run_decoder(model, batch)


def _check_finite(gates: Sequence[Gate], sums: Sequence[_Sums], domain: str) -> None:
    for gate, gate_sums in zip(gates, sums, strict=True):
        if not bool(gate_sums.gram_WW.isfinite().all()):
            raise InputError(
                f"expected finite inputs of {gate.name}, but text of {domain!r} gives NaN or "
                "infinite values there; check the weights of the layers before it"
            )


def _statistics(gate: Gate, sums: _Sums, labels: Mapping[int, _Label]) -> GateStatistics:
    counts = [labels[e].total if e in labels else 0 for e in range(gate.experts)]
    return GateStatistics(
        name=gate.name,
        layer=gate.layer,
        gram_WW=sums.gram_WW,
        sum_EW=sums.sum_EW,
        count_E=torch.tensor(counts, device=sums.sum_EW.device),
        sample_NW=torch.cat([torch.empty(0, sums.gram_WW.shape[0]), *sums.sample]),
        label_N=torch.cat([torch.empty(0, dtype=torch.int64), *sums.labels]),
    )
