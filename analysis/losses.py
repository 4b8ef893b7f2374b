"""Losses by token and document on labelled text, with intervals over documents.

N predicted tokens of all domains, M documents, D domains, P bootstrap replicates, W windows,
C context length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from scipy.stats import permutation_test
from torch import nn

from moiety.analysis.results.measured import Interval
from moiety.analysis.statistics.measures import Floats
from moiety.analysis.statistics.resampling import TAIL, Draws
from moiety.errors import InputError
from moiety.scoring import token_losses
from moiety.text import Windows

FEWEST = 2


@dataclass(frozen=True)
class LabelledWindows:
    """Windows of several domains, and which document each of their predicted tokens is of."""

    windows: dict[str, Windows]

    @classmethod
    def of(cls, data: Mapping[str, Windows]) -> "LabelledWindows":
        """Check that there is text; InputError otherwise."""
        for domain, each in data.items():
            if len(each) == 0:
                raise InputError(f"data must give windows for each domain, but {domain!r} has none")
        if not data:
            raise InputError("data must name at least one domain, but it is empty")
        return cls(dict(data))

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains in order."""
        return tuple(self.windows)

    @cached_property
    def document_N(self) -> NDArray[numpy.int64]:
        """Document of each predicted token, numbered from 0 over all domains."""
        parts, first = [], 0
        for windows in self.windows.values():
            _, number_W = windows.document_W.unique(return_inverse=True)
            number_WC = number_W[:, None].expand_as(windows.mask_WC)[:, 1:]
            parts.append(number_WC[windows.mask_WC[:, 1:].bool()] + first)
            first += int(number_W.max()) + 1
        return torch.cat(parts).numpy()

    @cached_property
    def documents(self) -> "LossDocuments":
        """The documents, with their domains and predicted tokens."""
        counts = [len(windows.document_W.unique()) for windows in self.windows.values()]
        return LossDocuments(
            self.domains,
            numpy.repeat(numpy.arange(len(counts)), counts),
            numpy.bincount(self.document_N, minlength=sum(counts)),
        )

    @torch.no_grad()
    def losses(self, model: nn.Module, batch_size: int) -> Floats:
        """Nats of every predicted token of all domains (N,)."""
        device = next(model.parameters()).device
        parts: list[NDArray[Any]] = []
        for windows in self.windows.values():
            for batch in windows.batches(batch_size):
                logits_WCV = model(
                    input_ids=batch.ids_WC.to(device),
                    attention_mask=batch.mask_WC.to(device),
                    use_cache=False,
                ).logits
                losses_WC = token_losses(logits_WCV, batch.ids_WC, batch.mask_WC).cpu()
                parts.append(losses_WC[:, 1:][batch.mask_WC[:, 1:].bool()].numpy())
        return numpy.concatenate(parts).astype(float)

    def by_document(self, loss_N: Floats) -> Floats:
        """Nats of each document (M,)."""
        documents = len(self.documents.tokens_M)
        sums_M = numpy.bincount(self.document_N, weights=loss_N, minlength=documents)
        return sums_M.astype(numpy.float64)


@dataclass(frozen=True)
class LossDocuments:
    """Documents as the unit of what losses are: means by domain are of tokens, intervals of these.

    `resamples` bootstrap draws and `permutations` of signs come from `seed`.
    """

    domains: tuple[str, ...]
    domain_M: NDArray[numpy.integer]
    tokens_M: NDArray[numpy.integer]
    resamples: int = 999
    permutations: int = 999
    seed: int = 0

    @cached_property
    def _weight_PM(self) -> Floats:
        drawn = Draws(0, self.resamples, self.seed).weights(self.domain_M)
        return numpy.concatenate([numpy.ones((1, len(self.domain_M))), drawn])

    def _means(self, nats_M: Floats) -> Floats:
        """Nats per token of each domain: as it is, then drawn again (1 + P, D)."""
        own_MD = self.domain_M[:, None] == numpy.arange(len(self.domains))
        sums_PD = self._weight_PM @ (own_MD * nats_M[:, None])
        tokens_PD = self._weight_PM @ (own_MD * self.tokens_M[:, None]).astype(float)
        empty_PD = tokens_PD == 0
        return numpy.where(empty_PD, numpy.nan, sums_PD / numpy.where(empty_PD, 1, tokens_PD))

    def by_domain(self, nats_M: Floats) -> dict[str, Interval]:
        """Nats per token of each domain with its interval; NaN ends with a single document."""
        means_PD, count_D = self._means(nats_M), numpy.bincount(self.domain_M)
        return {
            name: _interval(means_PD[:, at], int(count_D[at]))
            for at, name in enumerate(self.domains)
        }

    def overall(self, nats_M: Floats) -> Interval:
        """Mean over domains."""
        return _interval(self._means(nats_M).mean(1), int(numpy.bincount(self.domain_M).min()))

    def mean_of(self, chosen: Sequence[tuple[str, Floats]]) -> Interval:
        """Mean over pairs of a domain and the nats of all documents."""
        columns = [self._means(nats_M)[:, self.domains.index(n)] for n, nats_M in chosen]
        return _interval(numpy.mean(columns, 0), int(numpy.bincount(self.domain_M).min()))

    def ratio(self, domain: str, above_M: Floats, below_M: Floats) -> Interval:
        """Ratio of two sums of nats in one domain."""
        at = self.domains.index(domain)
        above_P, below_P = self._means(above_M)[:, at], self._means(below_M)[:, at]
        with numpy.errstate(divide="ignore", invalid="ignore"):
            ratio_P = above_P / below_P
        return _interval(ratio_P, int((self.domain_M == at).sum()))

    def p_value(self, nats_M: Floats) -> float:
        """Two-sided p-value that documents' changes are as likely up as down (sign flips)."""
        if not numpy.any(nats_M):
            return 1.0
        tokens_D = numpy.bincount(self.domain_M, weights=self.tokens_M)
        share_M = nats_M / tokens_D[self.domain_M]
        if len(share_M) < FEWEST:
            return 1.0
        found = permutation_test(
            (share_M,),
            numpy.sum,
            permutation_type="samples",
            vectorized=True,
            n_resamples=self.permutations,
            rng=numpy.random.default_rng((self.seed, 9)),
        )
        return float(found.pvalue)


def _interval(value_P: Floats, documents: int) -> Interval:
    """The first value with the quantiles of the others."""
    known_P = value_P[1:][numpy.isfinite(value_P[1:])]
    if documents < FEWEST or not len(known_P):
        return Interval(value=float(value_P[0]), low=numpy.nan, high=numpy.nan)
    low, high = numpy.quantile(known_P, [TAIL, 1 - TAIL])
    return Interval(value=float(value_P[0]), low=float(low), high=float(high))
