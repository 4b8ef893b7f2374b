"""Figures as PNG or SVG files, drawn by a headless Chromium that the machine has."""

import base64
import html
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from plotly.offline import get_plotlyjs

from moiety.analysis.reporting.document import Figure
from moiety.analysis.reporting.page import as_json, template
from moiety.errors import InputError, OutputError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FORMATS = ("png", "svg")
SECONDS = 120
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=60000",
)
PICTURES = re.compile(r'<pre id="pictures">(.*?)</pre>', re.DOTALL)


def find_browser() -> str | None:
    """A Chromium on the PATH."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def write_figures(figures: Sequence[Figure], folder: Path, kind: str = "svg") -> list[Path]:
    """Write each figure to `folder` as NAME.png or NAME.svg, in the light theme, and give the paths.

    Raises InputError for another kind, or where there is no Chromium to draw with; OutputError
    when it fails.
    """
    if kind not in FORMATS:
        raise InputError(f"figures are written as {' or '.join(FORMATS)}, but not as {kind!r}")
    browser = find_browser()
    if browser is None:
        raise InputError(
            f"expected a browser to draw the figures, but none of {', '.join(BROWSERS)} is on the "
            "PATH; install Debian's chromium, or take the figures from the HTML report"
        )
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in _drawn(figures, browser, kind).items():
        path = folder / f"{name}.{kind}"
        path.write_bytes(picture)
        paths.append(path)
    return paths


def _drawn(figures: Sequence[Figure], browser: str, kind: str) -> dict[str, bytes]:
    specs = {
        one.name: {**one.spec, "title": html.escape(one.title, quote=False)} for one in figures
    }
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "figures.html"
        page.write_text(_page(as_json(specs), kind), encoding="utf-8")
        command = [browser, *FLAGS, f"--user-data-dir={scratch}/profile", "--dump-dom"]
        try:
            done = subprocess.run(
                [*command, page.as_uri()], capture_output=True, timeout=SECONDS, check=True
            )
        except (subprocess.SubprocessError, OSError) as error:
            raise OutputError(f"expected {browser} to draw the figures, but: {error}") from error
    found = PICTURES.search(done.stdout.decode("utf-8", "replace"))
    if found is None:
        raise OutputError(f"expected {browser} to draw the figures, but it gave none")
    return {name: _bytes(url) for name, url in json.loads(html.unescape(found[1])).items()}


def _page(figures: str, kind: str) -> str:
    return (
        '<!doctype html><meta charset="utf-8"><body>'
        f'<script type="application/json" id="figures-data">{figures}</script>'
        f"<script>{get_plotlyjs()}</script><script>{template('themes.js')}</script>"
        f'<script>const kind = "{kind}";\n{template("pictures.js")}</script>'
    )


def _bytes(url: str) -> bytes:
    head, _, body = url.partition(",")
    return base64.b64decode(body) if head.endswith("base64") else unquote(body).encode()
