"""A report as one HTML file that asks the network for nothing.

Scripts, styles and data are inside, and the content security policy lets only those very scripts
run. All text of a trace is untrusted: the template escapes it, data is JSON in which no markup can
start, and hidden characters are made visible.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from moiety.analysis.reporting.document import Document
from moiety.analysis.samples import Sample
from moiety.analysis.tables import ROWS, SIZES
from moiety.analysis.view import shown_documents, shown_tokens
from moiety.version import __version__

TEMPLATES = resources.files("moiety.analysis") / "templates"


def page(
    document: Document, view: Mapping[str, Any] | None = None, samples: Sequence[Sample] = ()
) -> str:
    """The report as HTML; `view` is a `token_view` with the `total` tokens and documents traced."""
    names = ["themes.js", "charts.js", *([] if view is None else ["tokens.js"])]
    scripts = [script(get_plotlyjs()), *(script(template(name)) for name in names)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template("report.html.j2")).render(
        document=document,
        policy=policy(scripts),
        style=Markup(template("report.css")),
        scripts=[Markup(one) for one in scripts],
        figures=as_json({one.name: one.spec for one in document.figures}),
        view=None if view is None else as_json(view),
        shown=None if view is None else _shown(view),
        samples=samples,
        marked=(ROWS["composite"], SIZES["composite"]),
        version=__version__,
    )


def _shown(view: Mapping[str, Any]) -> str:
    tokens, documents = shown_tokens(view), shown_documents(view)
    total, all_documents = view["total"]
    text = f"Showing {tokens:,} of {total:,} tokens"
    if documents < all_documents or tokens < total:
        text += (
            f", from {documents:,} of {all_documents:,} documents: the first of each domain, so that "
            "the page opens fast"
        )
    return f"{text}. Every other number on this page is of all tokens."


def template(name: str) -> str:
    """The text of a file beside this package's templates."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def script(source: str) -> str:
    """A script as the browser will hash it: line ends as HTML reads them."""
    return source.replace("\r\n", "\n").replace("\r", "\n")


def as_json(value: Any) -> Markup:
    """JSON for a script element: ASCII only, and nothing that markup could start with."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def policy(scripts: Sequence[str]) -> str:
    """The content security policy that lets these scripts run and nothing else."""
    hashes = (hashlib.sha256(one.encode()).digest() for one in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(value).decode()}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
