"""The summary of a trace: who is routed where, and whether that is more than chance.

T tokens, L routed layers, A active experts, E experts, D domains, M documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

from moiety.analysis.results.measured import LayerMeasure, Measured
from moiety.analysis.results.parts import Phase
from moiety.analysis.results.routing import RoutingSummary
from moiety.analysis.statistics.cells import cells
from moiety.analysis.statistics.distances import distances
from moiety.analysis.statistics.measures import (
    Floats,
    cramers_v_squared,
    entropy,
    load,
    matched,
    matched_share,
    max_violation,
    mean_by_domain,
    mutual_information,
    route_counts,
    top_counts,
    top_share,
    weight_share,
)
from moiety.analysis.statistics.pairs import coactivation, flow
from moiety.analysis.statistics.resampling import (
    Documents,
    Draws,
    Statistic,
    measure,
    smallest_p,
)
from moiety.analysis.statistics.sequence import positions, reading_order, repetition
from moiety.analysis.statistics.vocabulary import vocabulary
from moiety.analysis.trace.file import PHASES, Header, Trace
from moiety.errors import InputError

Counted = Literal["first", "chosen"]


def summarise(
    trace: Trace,
    own_expert: Mapping[str, str | int] | None = None,
    *,
    counted: Counted = "first",
    permutations: int = 999,
    resamples: int = 999,
    seed: int = 0,
) -> RoutingSummary:
    """Compute every statistic of a trace.

    `own_expert` maps a domain to its expert's name or index; by default a domain owns the expert
    of its name, and a domain without one has no own-domain share. `counted` says whether a token
    counts for its `first` expert only or for all its `chosen` ones where domains are held against
    experts. Raises InputError when the map names a domain or expert that the trace does not have,
    or a setting is out of range.
    """
    _check(counted, permutations, resamples)
    owners = own_experts(trace.header, own_expert)
    return _Summing(trace, owners, counted, Draws(permutations, resamples, seed)).summary()


def _check(counted: str, permutations: int, resamples: int) -> None:
    if counted not in ("first", "chosen"):
        raise InputError(f"counted must be first or chosen, but it is {counted!r}")
    for name, value in (("permutations", permutations), ("resamples", resamples)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, but it is {value}")


def own_experts(header: Header, own_expert: Mapping[str, str | int] | None) -> dict[str, int]:
    """The expert index of each domain that has an expert; see `summarise`."""
    if own_expert is None:
        shared = [name for name in header.domains if name in header.experts]
        return {name: header.experts.index(name) for name in shared}
    for domain in own_expert:
        if domain not in header.domains:
            raise InputError(f"own_expert names domain {domain!r}, not in {header.domains}")
    return {domain: _expert_index(header, expert) for domain, expert in own_expert.items()}


def _expert_index(header: Header, expert: str | int) -> int:
    if isinstance(expert, str) and expert in header.experts:
        return header.experts.index(expert)
    if isinstance(expert, int) and 0 <= expert < len(header.experts):
        return expert
    raise InputError(
        f"own_expert names expert {expert!r}; expected one of {header.experts} "
        f"or an index from 0 to {len(header.experts) - 1}"
    )


@dataclass(frozen=True)
class _Summing:
    """One trace on its way to its summary."""

    trace: Trace
    owners: dict[str, int]
    counted: Counted
    draws: Draws

    @cached_property
    def first_LT(self) -> NDArray[numpy.int16]:
        return numpy.ascontiguousarray(self.trace.experts_TLA[:, :, 0].T)

    @cached_property
    def document_T(self) -> NDArray[numpy.intp]:
        return numpy.unique(self.trace.document_T, return_inverse=True)[1]

    @cached_property
    def documents(self) -> Documents:
        trace = self.trace
        _, first_M = numpy.unique(trace.document_T, return_index=True)
        experts_TLA = trace.experts_TLA if self.counted == "chosen" else self.first_LT.T[..., None]
        counts_LME = route_counts(
            experts_TLA, self.document_T, len(first_M), len(trace.header.experts)
        )
        return Documents(counts_LME, trace.domain_T[first_M], len(trace.header.domains))

    @cached_property
    def domain_shares(self) -> Floats:
        trace, documents = self.trace, self.documents
        counts_LDE = top_counts(
            trace.experts_TLA, trace.domain_T, documents.domains, len(trace.header.experts)
        )
        return top_share(counts_LDE)

    def summary(self) -> RoutingSummary:
        header, documents, draws = self.trace.header, self.documents, self.draws
        measures = self._measures()
        [whole_LDE] = next(documents.relabelled(documents.domain_M[None]))
        experts_LAT = numpy.ascontiguousarray(self.trace.experts_TLA.transpose(1, 2, 0))
        return RoutingSummary(
            header=header,
            counted=self.counted,
            permutations=draws.permutations,
            resamples=draws.resamples,
            seed=draws.seed,
            smallest_p=smallest_p(documents.domain_M, draws.permutations),
            **self._shares(),
            information=measures["information"],
            nmi=measures["nmi"],
            cramers_v=_rooted(measures["cramers_v"]),
            matching=measures["matching"],
            matched_LD=matched(whole_LDE),
            own_expert=self.owners,
            own_share=measures.get("own_share"),
            cells=cells(documents, draws),
            distances=distances(documents, draws.seed),
            coactivation=coactivation(experts_LAT, len(header.experts)),
            flow=flow(self.first_LT, self.document_T, len(header.experts), draws.seed),
            vocabulary=vocabulary(
                self.first_LT,
                self.trace.token_id_T,
                self.document_T,
                documents,
                draws,
            ),
            **self._along_the_text(),
            phases=self._phases(),
        )

    def _measures(self) -> dict[str, LayerMeasure]:
        statistics: dict[str, Statistic] = {
            "information": lambda table: mutual_information(table)[0],
            "nmi": lambda table: mutual_information(table)[1],
            "cramers_v": cramers_v_squared,
            "matching": matched_share,
        }
        if self.owners:
            domains = [self.trace.header.domains.index(name) for name in self.owners]
            statistics["own_share"] = _own_share(domains, list(self.owners.values()))
        return measure(self.documents, statistics, self.draws)

    def _shares(self) -> dict[str, Any]:
        trace, header = self.trace, self.trace.header
        domains, experts = len(header.domains), len(header.experts)
        chosen_LDE = route_counts(trace.experts_TLA, trace.domain_T, domains, experts)
        load_LE = self._load()
        entropies = [mean_by_domain(one_T, trace.domain_T, domains) for one_T in trace.entropy_TL.T]
        own_DL = numpy.full((domains, len(header.layers)), numpy.nan)
        for name, expert in self.owners.items():
            row = header.domains.index(name)
            own_DL[row] = self.domain_shares[row, :, expert]
        return {
            "share_DLE": weight_share(
                trace.experts_TLA, trace.weights_TLA, trace.domain_T, domains, experts
            ),
            "top_share_DLE": self.domain_shares,
            "chosen_share_DLE": top_share(chosen_LDE) * header.active,
            "load_LE": load_LE,
            "max_violation_L": max_violation(load_LE),
            "load_entropy_L": entropy(load_LE) / max(numpy.log(experts), 1e-12),
            "entropy_DL": numpy.stack(entropies, 1),
            "loss_D": mean_by_domain(trace.loss_T, trace.domain_T, domains),
            "own_share_DL": own_DL,
        }

    def _load(self) -> Floats:
        """Share of all routes, or of all weight where every token goes to every expert."""
        trace, header = self.trace, self.trace.header
        experts = len(header.experts)
        if header.active < experts:
            return load(trace.experts_TLA, experts)
        whole_T = numpy.zeros_like(trace.domain_T)
        return weight_share(trace.experts_TLA, trace.weights_TLA, whole_T, 1, experts)[0]

    def _along_the_text(self) -> dict[str, Any]:
        trace = self.trace
        order_T, start_W = reading_order(trace)
        own_D = numpy.full(len(trace.header.domains), -1)
        for name, expert in self.owners.items():
            own_D[trace.header.domains.index(name)] = expert
        own_T = own_D[trace.domain_T]
        return {
            "repetition": repetition(self.first_LT, trace, order_T, start_W, self.documents),
            "positions": positions(self.first_LT, trace, order_T, start_W, own_T, self.draws.seed),
        }

    def _phases(self) -> dict[str, Phase]:
        trace, experts = self.trace, len(self.trace.header.experts)
        counts_LPE = route_counts(trace.experts_TLA, trace.phase_T, len(PHASES), experts)
        tokens_P = numpy.bincount(trace.phase_T, minlength=len(PHASES))
        return {
            name: Phase(
                tokens=int(tokens_P[code]),
                share_LE=counts_LPE[:, code] / (tokens_P[code] * trace.header.active),
                lit_L=(counts_LPE[:, code] > 0).sum(1),
            )
            for code, name in enumerate(PHASES)
            if tokens_P[code]
        }


def _own_share(domains: list[int], experts: list[int]) -> Statistic:
    def statistic(table_PLDE: Floats) -> Floats:
        own_PLN = table_PLDE[:, :, domains, experts]
        totals_PLN = table_PLDE.sum(-1)[:, :, domains]
        return (own_PLN / numpy.maximum(totals_PLN, 1)).mean(-1)

    return statistic


def _rooted(squared: LayerMeasure) -> LayerMeasure:
    """Cramer's V from its square, corrected before the root is taken; below 0 counts as 0."""

    def root(value: float) -> float:
        return float(numpy.sqrt(max(value, 0.0)))

    def one(measured: Measured) -> Measured:
        return Measured(
            observed=root(measured.observed),
            corrected=root(measured.corrected),
            low=root(measured.low),
            high=root(measured.high),
            mean=root(measured.mean),
            quantile_95=root(measured.quantile_95),
            p_value=measured.p_value,
            adjusted_p=measured.adjusted_p,
        )

    return LayerMeasure(
        overall=one(squared.overall), layers=tuple(one(layer) for layer in squared.layers)
    )
