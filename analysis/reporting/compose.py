"""The argument of a report, put together from results: what is absent is left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moiety.analysis.headline import findings, key_figures, verdict
from moiety.analysis.reporting import arguments, comparison_figures, cost_figures, methods
from moiety.analysis.reporting import routing_figures as routing
from moiety.analysis.reporting.document import Document, Figure, Section
from moiety.analysis.results import Comparison, Counterfactuals, Retention, RoutingSummary
from moiety.analysis.results_tables import (
    comparison_tables,
    counterfactual_tables,
    gate_swap_table,
    retention_tables,
)
from moiety.analysis.tables import (
    controls_table,
    layer_table,
    resources_table,
    routing_table,
)
from moiety.analysis.visible import visible_line

MEASURES = ("loss", "bits_per_byte", "accuracy")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a report of one trace may draw on; only the summary must be there."""

    summary: RoutingSummary
    results: Mapping[str, Any]
    counterfactuals: Counterfactuals | None = None
    retention: Retention | None = None


def of_trace(found: Evidence) -> Document:
    """The report of one trace."""
    summary, header = found.summary, found.summary.header
    sections = [
        _controls(found.results),
        _where(summary),
        _words(summary),
        _flow(summary),
        _cost(found.counterfactuals),
        _retention(found.retention),
    ]
    more = [
        arguments.token_identity(summary),
        arguments.cells(summary),
        *(_cost_findings(found.counterfactuals) if found.counterfactuals else []),
        arguments.sparsity(found.retention) if found.retention else "",
    ]
    return Document(
        kicker=f"Routing report · {visible_line(header.model)} · {len(header.experts)} experts, "
        f"{header.active} active, {len(header.layers)} routed layers",
        title=verdict(summary),
        subject=visible_line(header.model),
        findings=tuple(one for one in (*findings(summary, found.results), *more) if one),
        key_figures=tuple(key_figures(summary, found.results)),
        sections=tuple(section for section in sections if section is not None),
        methods=(
            *methods.of_trace(summary),
            *(methods.of_counterfactuals(found.counterfactuals) if found.counterfactuals else []),
            ("Caveats", methods.CAVEATS),
            *methods.of_run(found.results),
        ),
    )


def _figures(*found: Figure | None) -> tuple[Figure, ...]:
    return tuple(one for one in found if one is not None)


def _controls(results: Mapping[str, Any]) -> Section | None:
    tables = [controls_table(results, measure) for measure in MEASURES]
    shown = tuple(table for table in (*tables, resources_table(results)) if table.rows)
    if not shown:
        return None
    return Section(
        name="controls",
        title="What it costs, against its controls",
        text=(
            "Lower is better, except for accuracy and speed. The random, uniform and oracle rows "
            "change only the route of the same composite, so their distance is what routing is worth.",
        ),
        tables=shown,
    )


def _where(summary: RoutingSummary) -> Section:
    own = routing.own_share(summary) if summary.own_expert else None
    return Section(
        name="where",
        title="Where each domain is routed",
        tables=(routing_table(summary),),
        figures=_figures(routing.share(summary), routing.information(summary), own),
        details=(layer_table(summary),),
    )


def _words(summary: RoutingSummary) -> Section | None:
    if len(summary.header.domains) < 2:
        return None
    return Section(
        name="words",
        title="Domain or vocabulary?",
        text=(
            "Domains use different words, and a router may only follow the word. What is left of the "
            "information once the token is known is not explained by vocabulary.",
        ),
        figures=_figures(routing.token_identity(summary), routing.distances(summary)),
    )


def _flow(summary: RoutingSummary) -> Section:
    return Section(
        name="flow-section",
        title="From layer to layer, and along the text",
        figures=_figures(
            routing.flow(summary),
            routing.flow_profile(summary),
            routing.positions(summary),
            routing.coactivation(summary),
        ),
    )


def _cost(found: Counterfactuals | None) -> Section | None:
    if found is None:
        return None
    forced, regrets, removed, swapped = counterfactual_tables(found)
    return Section(
        name="cost",
        title="What a wrong route costs",
        text=("Losses of the same documents under routes that the model did not choose.",),
        tables=(regrets,),
        figures=_figures(
            cost_figures.regret(found),
            cost_figures.forced(found),
            cost_figures.removed(found),
            cost_figures.removed_by_layer(found),
        ),
        details=tuple(table for table in (forced, removed, swapped) if table.rows),
    )


def _cost_findings(found: Counterfactuals) -> list[str]:
    return [arguments.regret(found), arguments.removal(found), arguments.redundancy(found)]


def _retention(found: Retention | None) -> Section | None:
    if found is None:
        return None
    losses, changes = retention_tables(found)
    return Section(
        name="retention-section",
        title="What sparsity does at home and away",
        tables=(changes,),
        figures=_figures(cost_figures.retention(found), cost_figures.retained(found)),
        details=(losses,),
    )


def of_comparison(found: Comparison) -> Document:
    """The report of two traces of the same text."""
    by_domain, by_layer = comparison_tables(found)
    swapped = [] if found.gate_swap is None else [gate_swap_table(found.gate_swap)]
    first, second = visible_line(found.first), visible_line(found.second)
    agreement = float(found.agreement_L.mean())
    return Document(
        kicker=f"Comparison · first: {first} · second: {second} · {found.tokens:,} tokens",
        title=arguments.comparison_verdict(found),
        subject=f"{first} and {second}",
        findings=tuple(arguments.comparison_findings(found)),
        key_figures=(
            (f"{agreement:.2f}", "adjusted mutual information of the routes; chance 0"),
            *arguments.comparison_numbers(found),
        ),
        sections=(
            Section(
                name="where",
                title="Where the two differ",
                tables=(by_domain, *swapped),
                figures=_figures(*comparison_figures.all_of(found)),
                details=(by_layer,),
            ),
        ),
        methods=tuple(methods.of_comparison(found)),
    )
