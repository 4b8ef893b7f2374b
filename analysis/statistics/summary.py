"""The summary of a trace: who is routed where, and whether that is more than chance.

T tokens, L routed layers, A active experts, E experts, D domains, M documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy

from moiety.analysis.statistics.measures import (
    Floats,
    load,
    max_violation,
    mean_by_domain,
    mutual_information,
    top_counts,
    top_share,
    weight_share,
)
from moiety.analysis.statistics.permutation import PermutationTest, permutation_test
from moiety.analysis.trace.file import Header, Trace
from moiety.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RoutingSummary:
    """The statistics of one trace; domains, layers and experts in the order of `header`.

    `share_DLE` mean routing weight, `top_share_DLE` share of tokens by top-1 expert, `load_LE`
    share of all routes, `max_violation_L` its MaxVio, `entropy_DL` mean entropy of the gates in
    nats, `information_L` nats between domain and top-1 expert, `test` their normalised form
    against permuted documents, `own_expert` the expert index of each domain that has one,
    `own_share_DL` share of those domains' tokens whose top-1 expert it is (NaN without one),
    `loss_D` mean nats per token, `seed` of the permutations.
    """

    header: Header
    share_DLE: Floats
    top_share_DLE: Floats
    load_LE: Floats
    max_violation_L: Floats
    entropy_DL: Floats
    information_L: Floats
    test: PermutationTest
    own_expert: dict[str, int]
    own_share_DL: Floats
    loss_D: Floats
    seed: int

    @property
    def normalized_mutual_information(self) -> float:
        """I / sqrt(H(E) H(D)) of domain and top-1 expert, domains equal, mean over layers."""
        return self.test.overall.observed

    @property
    def own_domain_share(self) -> dict[str, float]:
        """Share of each domain's tokens that go first to its expert, mean over layers."""
        means = self.own_share_DL.mean(1)
        domains = self.header.domains
        return {name: float(means[domains.index(name)]) for name in self.own_expert}

    @property
    def loss(self) -> dict[str, float]:
        """Mean loss of each domain in nats per token."""
        return dict(zip(self.header.domains, self.loss_D.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """As JSON: arrays as nested lists, NaN as null."""
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {
            **values,
            "header": self.header.to_dict(),
            "normalized_mutual_information": self.normalized_mutual_information,
            "own_domain_share": self.own_domain_share,
            "loss": _plain(self.loss),
        }


def summarise(
    trace: Trace,
    own_expert: Mapping[str, str | int] | None = None,
    *,
    permutations: int = 200,
    seed: int = 0,
) -> RoutingSummary:
    """Compute every statistic of a trace.

    `own_expert` maps a domain to its expert's name or index; by default a domain owns the expert
    of its name, and a domain without one has no own-domain share. Raises InputError when the map
    names a domain or expert that the trace does not have.
    """
    header = trace.header
    domains, experts = len(header.domains), len(header.experts)
    owners = own_experts(header, own_expert)
    counts_LDE = top_counts(trace.experts_TLA, trace.domain_T, domains, experts)
    top_share_DLE = top_share(counts_LDE)
    load_LE = load(trace.experts_TLA, experts)
    return RoutingSummary(
        header=header,
        share_DLE=weight_share(
            trace.experts_TLA, trace.weights_TLA, trace.domain_T, domains, experts
        ),
        top_share_DLE=top_share_DLE,
        load_LE=load_LE,
        max_violation_L=max_violation(load_LE),
        entropy_DL=_entropies(trace, domains),
        information_L=mutual_information(counts_LDE)[0],
        test=_test(trace, permutations, seed),
        own_expert=owners,
        own_share_DL=_own_shares(top_share_DLE, header, owners),
        loss_D=mean_by_domain(trace.loss_T, trace.domain_T, domains),
        seed=seed,
    )


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


def _own_shares(top_share_DLE: Floats, header: Header, owners: Mapping[str, int]) -> Floats:
    own_DL = numpy.full(top_share_DLE.shape[:2], numpy.nan)
    for domain, expert in owners.items():
        row = header.domains.index(domain)
        own_DL[row] = top_share_DLE[row, :, expert]
    return own_DL


def _entropies(trace: Trace, domains: int) -> Floats:
    layers = [
        mean_by_domain(entropy_T, trace.domain_T, domains) for entropy_T in trace.entropy_TL.T
    ]
    return numpy.stack(layers, axis=1)


def _test(trace: Trace, permutations: int, seed: int) -> PermutationTest:
    _, first_M, document_T = numpy.unique(trace.document_T, return_index=True, return_inverse=True)
    counts_LME = top_counts(trace.experts_TLA, document_T, len(first_M), len(trace.header.experts))
    return permutation_test(
        counts_LME,
        trace.domain_T[first_M],
        len(trace.header.domains),
        permutations=permutations,
        seed=seed,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, numpy.ndarray):
        return _plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not numpy.isfinite(value) else value
