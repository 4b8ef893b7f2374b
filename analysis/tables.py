"""The tables of a report, the same in a terminal and in a browser."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from moiety.analysis.statistics import RoutingSummary
from moiety.analysis.visible import visible_line
from moiety.errors import InputError
from moiety.units import size

ABSENT = "\N{EN DASH}"

ROWS = {
    "base": "base (dense)",
    "finetune": "each finetune, own domain (dense)",
    "expert": "each sparse expert, own domain",
    "soup": "uniform soup of the finetunes (dense)",
    "task_arithmetic": "task arithmetic (dense)",
    "composite_dense": "composite of dense experts, learned router",
    "composite": "composite, learned router",
    "uniform": "composite, uniform route",
    "random": "composite, random route",
    "sequence_level": "composite, one route a sequence",
    "oracle": "composite, oracle route (own-domain expert)",
    "mixture": "mixture of FFN experts instead, learned router",
    "mixture_oracle": "mixture of FFN experts instead, oracle route",
    "routed": "routed deltas of every linear instead, learned router",
    "routed_oracle": "routed deltas of every linear instead, oracle route",
}
ROUTELESS = {"composite_dense": "the same merge, unpruned", "composite": "merge"}
"""Labels of what has no router, and so no rows of a router's controls."""
MEASURES = {
    "loss": ("Loss, nats per token", "{:.3f}"),
    "bits_per_byte": ("Bits per byte", "{:.3f}"),
    "accuracy": ("Accuracy", "{:.1%}"),
}
SIZES = {
    "dense_composite": "composite of dense experts",
    "composite": "composite, sparse experts",
    "dense_model": "the same, dense",
    "model": "model",
    "experts_dense": "expert matrices alone, dense",
    "experts_packed": "expert matrices alone, packed",
}
DENSE_OF = {
    "composite": "dense_composite",
    "model": "dense_model",
    "experts_packed": "experts_dense",
}
SPEED_OF = {"dense_composite": "composite_dense"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, column heads, rows of strings (the first cell names the row) and a note."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def _repr_html_(self) -> str:
        """For a notebook, escaped, without scripts."""
        head = "".join(f"<th>{escape(visible_line(name))}</th>" for name in self.columns)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(visible_line(cell))}</td>' for cell in row)}</tr>"
            for row in self.rows
        )
        title, note = escape(visible_line(self.title)), escape(visible_line(self.note))
        return f"<table><caption>{title}</caption><tr>{head}</tr>{rows}</table><p>{note}</p>"

    def to_rich(self) -> RichTable:
        """For a terminal: numbers to the right, markup and control characters shown as text."""
        table = RichTable(title=self.title, caption=self.note or None, title_justify="left")
        for index, name in enumerate(self.columns):
            table.add_column(_text(name), justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*(_text(cell) for cell in row))
        return table


def controls_table(results: Mapping[str, Any], measure: str = "loss") -> Table:
    """One measure of every model and route for every domain, with the mean over domains.

    `measure` is `loss` (nats per token), `bits_per_byte` or `accuracy`. A row has a mean only
    when it covers every domain: means over different domains do not compare. Raises InputError
    for another measure, or a value that is not a number.
    """
    if measure not in MEASURES:
        raise InputError(f"measure must be one of {tuple(MEASURES)}, but it is {measure!r}")
    title, form = MEASURES[measure]
    values = section(results, measure)
    if measure == "accuracy":
        values = _turned(values)
    domains = _domains(results, values)
    rows = [
        (label, *_row(section(values, key), domains, form, f"{measure}.{key}"))
        for key, label in _labelled(values, ROWS if _routes(results) else {**ROWS, **ROUTELESS})
    ]
    columns = ("model and route", *(visible_line(name) for name in domains), "mean")
    shown = len(columns) if len(domains) > 1 else 2
    context = results.get("context_length")
    note = "" if context is None else f"Context length {context} tokens."
    return Table(
        title=title,
        columns=columns[:shown],
        rows=tuple(row[:shown] for row in rows),
        note=visible_line(note),
    )


def _routes(results: Mapping[str, Any]) -> bool:
    return any("uniform" in (results.get(measure) or {}) for measure in MEASURES)


def resources_table(results: Mapping[str, Any]) -> Table:
    """Bytes of weights and tokens per second of the composite and its dense twin."""
    sizes, speeds = section(results, "bytes"), section(results, "tokens_per_second")
    rows = [(label, *_resources(key, sizes, speeds)) for key, label in _labelled(sizes, SIZES)]
    told = {SPEED_OF.get(key, key) for key in sizes}
    rows += [
        (label, ABSENT, ABSENT, *_speed(speeds, key))
        for key, label in _labelled(speeds, ROWS)
        if key not in told
    ]
    device = visible_line(str(results.get("device", "")))
    return Table(
        title="Bytes and speed",
        columns=("", "weights", "of dense", "prefill tokens/s", "decode tokens/s"),
        rows=tuple(rows),
        note=f"Measured on {device}." if device else "",
    )


def routing_table(summary: RoutingSummary) -> Table:
    """For each domain of a trace: its size, loss, favourite expert and own-domain share."""
    header, own = summary.header, summary.own_domain_share
    layers = len(header.layers)
    rows = []
    for row, domain in enumerate(header.domains):
        weights_E = summary.share_DLE[row].mean(0)
        best = int(weights_E.argmax())
        rows.append(
            (
                visible_line(domain),
                f"{header.documents[domain]:,}",
                f"{header.tokens[domain]:,}",
                number(float(summary.loss_D[row]), "{:.3f}", f"loss of {domain}"),
                f"{visible_line(header.experts[best])} ({weights_E[best]:.0%})",
                f"{own[domain]:.1%}" if domain in own else ABSENT,
            )
        )
    return Table(
        title="Routing by domain",
        columns=(
            "domain",
            "documents",
            "tokens",
            "loss, nats per token",
            "most weight to",
            "first to own expert",
        ),
        rows=tuple(rows),
        note=("" if layers == 1 else f"Means over {layers} layers. ")
        + f"Chance is {1 / len(header.experts):.1%}.",
    )


def layer_table(summary: RoutingSummary) -> Table:
    """For each layer: information against its null, balance, entropy and own-domain share."""
    owners = [summary.header.domains.index(domain) for domain in summary.own_expert]
    rows = []
    for layer, null in enumerate(summary.nmi.layers):
        own_D = summary.own_share_DL[owners, layer]
        own = float(own_D.mean()) if owners else None
        rows.append(
            (
                str(layer),
                f"{null.observed:.3f}",
                f"{null.quantile_95:.3f}",
                f"{null.adjusted_p:.3f}",
                number(own, "{:.1%}", "own-domain share"),
                f"{summary.max_violation_L[layer]:.2f}",
                f"{summary.entropy_DL[:, layer].mean():.2f}",
            )
        )
    columns = ("layer", "NMI", "null, 95%", "adjusted p", "first to own expert", "MaxVio")
    return Table(title="Routing by layer", columns=(*columns, "entropy, nats"), rows=tuple(rows))


def section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of results, empty when absent; raises InputError when it is not a mapping."""
    part = values.get(name, {})
    if not isinstance(part, Mapping):
        raise InputError(f"results: {name} must be a mapping, but it is {type(part).__name__}")
    return part


def number(value: Any, form: str, name: str) -> str:
    """Format a value; absent and not-a-number give a dash, anything else raises InputError."""
    if value is None:
        return ABSENT
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"results: {name} must be a number, but it is {value!r}")
    return form.format(value) if math.isfinite(value) else ABSENT


def mean_over(row: Mapping[str, Any], domains: Sequence[str]) -> float | None:
    """Mean over all domains; none when one is missing."""
    values = [row.get(domain) for domain in domains]
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _turned(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Accuracy comes as task -> row -> value: give row -> task -> value."""
    turned: dict[str, dict[str, Any]] = {}
    for task in values:
        for row, value in section(values, task).items():
            turned.setdefault(row, {})[task] = value
    return turned


def _domains(results: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[str, ...]:
    used = dict.fromkeys(domain for key in values for domain in section(values, key))
    named = [str(name) for name in results.get("domains", ())]
    return tuple(name for name in dict.fromkeys([*named, *used]) if name in used)


def _labelled(values: Iterable[str], labels: Mapping[str, str]) -> list[tuple[str, str]]:
    present = list(values)
    known = [(key, label) for key, label in labels.items() if key in present]
    other = [(key, visible_line(key.replace("_", " "))) for key in present if key not in labels]
    return known + other


def _row(values: Mapping[str, Any], domains: Sequence[str], form: str, name: str) -> list[str]:
    cells = [number(values.get(domain), form, f"{name}.{domain}") for domain in domains]
    return [*cells, number(mean_over(values, domains), form, name)]


def _resources(
    key: str, sizes: Mapping[str, Any], speeds: Mapping[str, Any]
) -> tuple[str, str, str, str]:
    stored, dense = sizes.get(key), sizes.get(DENSE_OF.get(key, ""))
    number(stored, "{}", f"bytes.{key}")
    number(dense, "{}", f"bytes.{DENSE_OF.get(key)}")
    ratio = f"{stored / dense:.0%}" if stored and dense else ABSENT
    return (size(stored) if stored else ABSENT, ratio, *_speed(speeds, SPEED_OF.get(key, key)))


def _speed(speeds: Mapping[str, Any], key: str) -> tuple[str, str]:
    row = section(speeds, key)
    prefill = number(row.get("prefill"), "{:,.0f}", f"tokens_per_second.{key}.prefill")
    decode = number(row.get("decode"), "{:,.1f}", f"tokens_per_second.{key}.decode")
    return prefill, decode


def _text(cell: str) -> Text:
    return Text(visible_line(cell))
