"""One HTML file that argues from a trace: the answer, its controls, where, and every token.

The file asks the network for nothing: scripts, styles and data are inside, and its content
security policy lets only those very scripts run. All text of a trace is untrusted: the template
escapes it, data is JSON in which no markup can start, and hidden characters are made visible.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from moiety.analysis.charts import information_figure, own_share_figure, share_figure
from moiety.analysis.headline import findings, key_figures, verdict
from moiety.analysis.samples import read_samples
from moiety.analysis.statistics import RoutingSummary, summarise
from moiety.analysis.tables import (
    ROWS,
    SIZES,
    Table,
    controls_table,
    layer_table,
    resources_table,
    routing_table,
)
from moiety.analysis.trace.file import Trace
from moiety.analysis.view import shown_tokens, token_view
from moiety.analysis.visible import visible_line
from moiety.errors import InputError, OutputError
from moiety.files import check_writable, write_text
from moiety.version import __version__

TEMPLATES = resources.files("moiety.analysis") / "templates"
SCRIPTS = ("charts.js", "tokens.js")


def report(
    trace: str | Path,
    out: str | Path,
    results: Mapping[str, Any] | None = None,
    *,
    own_expert: Mapping[str, str | int] | None = None,
    max_view_tokens: int = 20_000,
) -> Path:
    """Write the report of a trace to the HTML file `out` and give its path.

    `results` are the measured losses, bytes and speeds (the demo's `results.json`); what is
    absent is left out. `own_expert` as in `summarise`. The token view holds at most
    `max_view_tokens` tokens, shared equally by the domains.

    Raises InputError when the trace or `results` cannot be used, OutputError when `out` cannot be
    written.
    """
    if max_view_tokens < 1:
        raise InputError(f"max_view_tokens must be at least 1, but it is {max_view_tokens}")
    out = Path(out)
    if out.is_dir():
        raise OutputError(f"expected {out} to be a file to write, but it is a folder; add a name")
    opened = Trace.open(Path(trace))
    summary = summarise(opened, own_expert)
    page = render(opened, summary, results or {}, max_view_tokens)
    check_writable(out.parent)
    write_text(out, page)
    return out


def render(
    trace: Trace, summary: RoutingSummary, results: Mapping[str, Any], max_view_tokens: int
) -> str:
    """The report as HTML."""
    view = token_view(trace, summary, max_view_tokens)
    figures = {"share": share_figure(summary), "information": information_figure(summary)}
    if summary.own_expert:
        figures["own"] = own_share_figure(summary)
    scripts = [_script(get_plotlyjs()), *(_script(_template(name)) for name in SCRIPTS)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["visible"] = visible_line
    return environment.from_string(_template("report.html.j2")).render(
        policy=_policy(scripts),
        style=Markup(_template("report.css")),
        scripts=[Markup(script) for script in scripts],
        figures=_json(figures),
        view=_json(view),
        shown=shown_tokens(view),
        verdict=verdict(summary),
        findings=findings(summary, results),
        key_figures=key_figures(summary, results),
        tables=_tables(results),
        samples=read_samples(results),
        marked=(ROWS["composite"], SIZES["composite"]),
        routing=routing_table(summary),
        layers=layer_table(summary),
        summary=summary,
        results=results,
        version=__version__,
    )


def _tables(results: Mapping[str, Any]) -> list[Table]:
    tables = [controls_table(results, measure) for measure in ("loss", "bits_per_byte", "accuracy")]
    return [table for table in (*tables, resources_table(results)) if table.rows]


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _script(source: str) -> str:
    """A script as the browser will hash it: line ends as HTML reads them."""
    return source.replace("\r\n", "\n").replace("\r", "\n")


def _json(value: Any) -> Markup:
    """JSON for a script element: ASCII only, and nothing that markup could start with."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _policy(scripts: list[str]) -> str:
    hashes = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(value).decode()}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
