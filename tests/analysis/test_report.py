"""The report is one complete file that shows hostile text as text."""

import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moiety.analysis.report import report
from moiety.errors import InputError, OutputError

HOSTILE = [
    "</script><img src=x onerror=\"document.title='owned'\">",
    "\N{RIGHT-TO-LEFT OVERRIDE}txt.exe",
    "a\0b",
    "<!--<script>",
    "{{ 7 * 7 }}",
    "\N{LINE SEPARATOR}漢字🌞",
    "",
    "\n",
]
DOMAINS = ("arithmetic", "<b onmouseover=alert(1)>code</b>", "law & order", "prose")
LOSSES = {domain: 1.0 + at for at, domain in enumerate(DOMAINS)}
RESULTS: dict[str, Any] = {
    "context_length": 128,
    "seed": 7,
    "domains": list(DOMAINS),
    "loss": {"composite": LOSSES, "uniform": LOSSES, "<i>row</i>": LOSSES},
    "bits_per_byte": {"composite": LOSSES},
    "bytes": {"composite": 1_100_000, "dense_composite": 2_000_000},
    "device": "<u>machine</u>",
}


class Outline(HTMLParser):
    """Tags, identifiers and addresses of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)

    @property
    def ids(self) -> list[str]:
        return [value or "" for name, value in self.attributes if name == "id"]


@pytest.fixture
def hostile(plant: Callable[..., Path], tmp_path: Path) -> Path:
    trace = plant(purity=0.8, texts=HOSTILE, domains=DOMAINS)
    return report(trace, tmp_path / "report.html", RESULTS)


def data_of(page: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_structure(hostile: Path) -> None:
    outline = Outline(hostile.read_text())
    assert outline.tags.count("h1") == 1
    assert outline.tags.count("h2") == 6
    assert outline.tags.count("table") == 5
    assert outline.tags.count("script") == 6
    assert len(outline.ids) == len(set(outline.ids))
    for name in ("controls", "where", "words", "tokens", "methods", "text"):
        assert name in outline.ids
    for name in ("share", "information", "own", "token-identity", "distances", "flow", "positions"):
        assert {name, f"{name}-title", f"{name}-summary"} <= set(outline.ids)


def test_nothing_is_fetched_and_no_markup_comes_from_data(hostile: Path) -> None:
    page = hostile.read_text()
    outline = Outline(page)
    assert not {"img", "link", "iframe", "b", "i", "u", "object"} & set(outline.tags)
    names = {name for name, _ in outline.attributes}
    assert not {name for name in names if name.startswith("on")}
    assert "src" not in names
    addresses = [value for name, value in outline.attributes if name == "href"]
    assert addresses == ["#tokens"]
    policy = next(value for name, value in outline.attributes if name == "content")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert page.count("plotly.js v") == 1


def test_hostile_text_is_shown_as_text(hostile: Path) -> None:
    page = hostile.read_text()
    view = data_of(page, "view-data")
    tokens = view["documents"][0]["tokens"]
    assert tokens[0] == HOSTILE[0]
    assert tokens[1] == "⟨U+202E⟩txt.exe"
    assert tokens[2] == "a␀b"
    assert tokens[5] == "⟨U+2028⟩漢字🌞"
    assert view["domains"] == list(DOMAINS)
    assert html.escape(DOMAINS[1], quote=False) in page
    assert "{{ 7 * 7 }}" in tokens


def test_view_is_bounded_and_shared_by_domains(plant: Callable[..., Path], tmp_path: Path) -> None:
    out = report(plant(), tmp_path / "report.html", max_view_tokens=100)
    view = data_of(out.read_text(), "view-data")
    sizes = [0] * 4
    for document in view["documents"]:
        sizes[document["domain"]] += len(document["tokens"])
    assert sizes == [25] * 4
    assert "Showing 100 of 480 tokens, from 8 of 24 documents" in out.read_text()


def test_report_without_results_or_own_experts(plant: Callable[..., Path], tmp_path: Path) -> None:
    out = report(plant(), tmp_path / "report.html", own_expert={})
    outline = Outline(out.read_text())
    assert "controls" not in outline.ids
    assert "own" not in outline.ids
    assert outline.tags.count("table") == 2


def test_same_trace_gives_the_same_bytes(plant: Callable[..., Path], tmp_path: Path) -> None:
    trace = plant()
    first, again = (report(trace, tmp_path / name, RESULTS) for name in ("a.html", "b.html"))
    assert first.read_bytes() == again.read_bytes()


def test_wrong_places_are_refused(plant: Callable[..., Path], tmp_path: Path) -> None:
    trace = plant()
    with pytest.raises(OutputError, match="is a folder"):
        report(trace, tmp_path)
    with pytest.raises(InputError, match="max_view_tokens"):
        report(trace, tmp_path / "report.html", max_view_tokens=0)
    with pytest.raises(InputError, match="results: loss"):
        report(trace, tmp_path / "report.html", {"loss": {"base": {"law": "many"}}})
    assert not (tmp_path / "report.html").exists()


def test_samples_are_shown_as_text(plant: Callable[..., Path], tmp_path: Path) -> None:
    sample = {"prompt": "<b>in</b>\n", "continuation": "</pre><script>x</script>\0"}
    results = {"samples": {"law": sample}}
    trace = plant()
    page = report(trace, tmp_path / "report.html", results).read_text()
    assert "&lt;/pre&gt;&lt;script&gt;x&lt;/script&gt;␀" in page
    with pytest.raises(InputError, match=r"samples\.law"):
        report(trace, tmp_path / "report.html", {"samples": {"law": {"prompt": 1}}})
