"""Run every intervention over labelled text and put the losses together.

N predicted tokens, M documents, E experts.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from scipy.stats import false_discovery_control

from moiety.analysis.counterfactuals.changes import PROTOCOLS, ablate, force, leave_out, swap
from moiety.analysis.counterfactuals.tokens import one_token, whole_document
from moiety.analysis.losses import LabelledWindows
from moiety.analysis.results.counterfactuals import Change, Counterfactuals, Swap
from moiety.analysis.statistics.measures import Floats
from moiety.analysis.trace.watching import changeable_gates
from moiety.compose.composite import Composite
from moiety.compose.opening import open_any
from moiety.errors import InputError
from moiety.progress import SILENT, Progress
from moiety.routers import RouteChange, rerouted
from moiety.text import Windows, read_documents, token_windows

MOST_EXPERTS = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run.

    `experts` (indices) are intervened on, all when None, which needs at most 16; `by_layer` also
    removes them in one layer at a time; `swaps` exchanges every pair; `tokens` of each domain are
    sent to every expert by themselves; swapped experts are redundant when the loss grows by at
    most `margin` nats per token, upper end of the interval.
    """

    experts: tuple[int, ...] | None = None
    by_layer: bool = False
    swaps: bool = True
    tokens: int = 16
    margin: float = 0.01
    batch_size: int = 8
    resamples: int = 999
    seed: int = 0


def counterfactuals(
    model: str | Path,
    data: Mapping[str, str | Path],
    settings: Settings | None = None,
    *,
    context_length: int = 512,
    windows: int = 32,
    progress: Progress = SILENT,
) -> Counterfactuals:
    """Losses of a composite or any MoE (folder or hub id) under routes it did not choose.

    `data` is each domain's held-out text, at most `windows` windows of it. See `Settings` and
    `Counterfactuals`. Raises InputError before any long work.
    """
    documents = {domain: read_documents(path) for domain, path in data.items()}
    composite = open_any(model)
    cut = {
        domain: token_windows(composite.tokenizer, texts, context_length, windows)
        for domain, texts in documents.items()
    }
    return counterfactuals_of(composite, cut, settings or Settings(), progress)


def counterfactuals_of(
    composite: Composite,
    data: Mapping[str, Windows],
    settings: Settings,
    progress: Progress = SILENT,
) -> Counterfactuals:
    """As `counterfactuals`, of a composite in memory and windows of text."""
    return _Run(composite, LabelledWindows.of(data), settings, progress).result()


class _Run:
    def __init__(
        self, composite: Composite, text: LabelledWindows, settings: Settings, progress: Progress
    ) -> None:
        self.model = composite.model
        self.names = composite.experts
        self.gates = changeable_gates(composite.model)
        self.text = text
        self.settings = settings
        self.progress = progress
        self.documents = replace(text.documents, resamples=settings.resamples, seed=settings.seed)
        self.experts = _chosen(settings.experts, len(self.names))

    def result(self) -> Counterfactuals:
        learned_N = self.text.losses(self.model, self.settings.batch_size)
        learned_M = self.text.by_document(learned_N)
        forced_EN = numpy.stack(
            [self._losses(force(expert)) for expert in self._each(self.experts, "force experts")]
        )
        forced_ME = numpy.stack([self.text.by_document(loss_N) for loss_N in forced_EN], 1)
        return Counterfactuals(
            model=str(getattr(self.model.config, "name_or_path", "") or ""),
            experts=self.names,
            layers=tuple(gate.name for gate in self.gates),
            domains=self.text.domains,
            context_length=max(w.ids_WC.shape[1] for w in self.text.windows.values()),
            seed=self.settings.seed,
            protocols=PROTOCOLS,
            learned=self.documents.by_domain(learned_M),
            **self._regrets(learned_M, forced_ME),
            ablated=self._changes(ablate, learned_M, "ablate experts"),
            left_out=self._changes(leave_out, learned_M, "leave experts out"),
            swaps=self._swaps(learned_M),
            margin=self.settings.margin,
            token_regret=self._token_regret(learned_N, forced_EN),
            document_domain=tuple(self.text.domains[at] for at in self.documents.domain_M),
            document_tokens=tuple(self.documents.tokens_M.tolist()),
            document_learned=self._per_token(learned_M),
            document_forced_ME=self._wide(self._per_token(forced_ME)),
        )

    def _losses(self, change: RouteChange) -> Floats:
        with rerouted(self.gates, change):
            return self.text.losses(self.model, self.settings.batch_size)

    def _each(self, items: Sequence[Any], what: str) -> Any:
        return self.progress.track(items, what, len(items))

    def _per_token(self, nats_M: Floats) -> Floats:
        tokens_M = numpy.maximum(self.documents.tokens_M, 1)
        return nats_M / (tokens_M if nats_M.ndim == 1 else tokens_M[:, None])

    def _wide(self, values_XE: Floats) -> Floats:
        """Columns of all experts, NaN for those not intervened on."""
        wide = numpy.full((len(values_XE), len(self.names)), numpy.nan)
        wide[:, list(self.experts)] = values_XE
        return wide

    def _regrets(self, learned_M: Floats, forced_ME: Floats) -> dict[str, Any]:
        by_expert = [self.documents.by_domain(nats_M) for nats_M in forced_ME.T]
        domains = self.text.domains
        forced_DE = numpy.array([[one[name].value for one in by_expert] for name in domains])
        best_D = forced_DE.argmin(1)
        domain_best_M = forced_ME[numpy.arange(len(learned_M)), best_D[self.documents.domain_M]]
        return {
            "forced_DE": self._wide(forced_DE),
            "best_expert": {
                name: self.names[self.experts[best]]
                for name, best in zip(domains, best_D, strict=True)
            },
            "domain_regret": self.documents.by_domain(learned_M - domain_best_M),
            "document_regret": self.documents.by_domain(learned_M - forced_ME.min(1)),
        }

    def _changes(self, removed: Any, learned_M: Floats, what: str) -> tuple[Change, ...]:
        layers: list[int | None] = [None]
        if self.settings.by_layer:
            layers += [gate.layer for gate in self.gates]
        cases = list(itertools.product(layers, self.experts))
        found = [
            (expert, layer, self.text.by_document(self._losses(removed(expert, layer))))
            for layer, expert in self._each(cases, what)
        ]
        p_values = [self.documents.p_value(nats_M - learned_M) for _, _, nats_M in found]
        adjusted = false_discovery_control(p_values)
        return tuple(
            Change(
                expert=expert,
                layer=layer,
                by_domain=self.documents.by_domain(nats_M - learned_M),
                overall=self.documents.overall(nats_M - learned_M),
                p_value=p,
                adjusted_p=float(after),
            )
            for (expert, layer, nats_M), p, after in zip(found, p_values, adjusted, strict=True)
        )

    def _swaps(self, learned_M: Floats) -> tuple[Swap, ...]:
        pairs = list(itertools.combinations(self.experts, 2)) if self.settings.swaps else []
        swaps: list[Swap] = []
        for first, second in self._each(pairs, "swap experts"):
            change_M = self.text.by_document(self._losses(swap(first, second))) - learned_M
            overall = self.documents.overall(change_M)
            swaps.append(
                Swap(
                    first=first,
                    second=second,
                    by_domain=self.documents.by_domain(change_M),
                    overall=overall,
                    redundant=bool(overall.high <= self.settings.margin),
                )
            )
        return tuple(swaps)

    def _token_regret(self, learned_N: Floats, forced_EN: Floats) -> tuple[Any, ...]:
        whole = whole_document(self.text, learned_N, forced_EN)
        if not self.settings.tokens:
            return (whole,)
        one = one_token(
            self.model,
            self.gates,
            self.text,
            self.experts,
            self.settings.tokens,
            self.settings.seed,
        )
        return whole, one


def _chosen(experts: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if count < 2:
        raise InputError(f"expected at least 2 experts to choose among, but there is {count}")
    if experts is None and count > MOST_EXPERTS:
        raise InputError(
            f"expected experts to name at most {MOST_EXPERTS} of {count} to intervene on, since "
            "each takes several passes over the text, but it names none"
        )
    chosen = tuple(range(count)) if experts is None else tuple(dict.fromkeys(experts))
    strange = [expert for expert in chosen if not 0 <= expert < count]
    if strange or not chosen:
        raise InputError(f"experts must be indices from 0 to {count - 1}, but it is {experts}")
    return chosen
