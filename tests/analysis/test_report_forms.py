"""Every form of a report says the same: page, Markdown, JSON, CSV, terminal, card, pictures."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moiety.analysis.comparison import with_gate_swap
from moiety.analysis.report import Reported, report
from moiety.analysis.reporting import pictures
from moiety.analysis.reporting.plain import to_csv, to_markdown
from moiety.analysis.results import RoutingSummary, from_dict, write_result
from moiety.errors import InputError
from tests.analysis.results import comparison, counterfactuals, retention
from tests.moiety.test_cli import moiety

DOMAINS = ("arithmetic", "<b>code</b>", "law | order", "prose")


@pytest.fixture
def made(plant: Callable[..., Path]) -> Reported:
    """A report with every section."""
    folder = plant(domains=DOMAINS)
    write_result(folder / "counterfactuals.json", counterfactuals(DOMAINS))
    write_result(folder / "retention.json", retention(DOMAINS))
    return Reported.read(folder, {"bytes": {"composite": 1e6, "dense_composite": 2e6}})


def test_results_beside_the_trace_are_found_and_argued_from(made: Reported) -> None:
    said = " ".join(made.document.findings)
    assert "the learned route costs 0.330 [0.310, 0.350] nats per token more in prose" in said
    assert "Leaving out prose costs most: 0.250 [0.230, 0.270]" in said
    assert "Exchanged at a cost of at most 0.01 nats per token: arithmetic and <b>code</b>" in said
    assert "at home and 0.080 [0.060, 0.100] away from home" in said
    names = [section.name for section in made.document.sections]
    assert names == ["controls", "where", "words", "flow-section", "cost", "retention-section"]
    figures = [figure.name for figure in made.document.figures]
    assert len(figures) == len(set(figures))
    assert {"regret", "forced", "removed", "removed-by-layer", "retention"} <= set(figures)


def test_markdown_escapes_names(made: Reported) -> None:
    text = to_markdown(made.document)
    assert text.startswith("# Experts specialise strongly by domain\n")
    assert "\\<b\\>code\\</b\\>" in text and "law \\| order" in text
    assert "<b>" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.count(" | ") >= 1 for line in rows)
    assert "**Unit.** Documents, not tokens" in text


def test_csv_is_tidy_and_no_formula(made: Reported) -> None:
    rows = list(csv.reader(StringIO(to_csv(made.document))))
    assert rows[0] == ["table", "row", "column", "value"]
    assert {len(row) for row in rows} == {4}
    assert ["Routing by domain", "prose", "tokens", "120"] in rows
    plant = counterfactuals(("=1+1()", "b"))
    hostile = Reported.of(comparison(plant.domains))
    cells = [cell for row in csv.reader(StringIO(to_csv(hostile.document))) for cell in row]
    assert "'=1+1()" in cells and "=1+1()" not in cells


def test_json_holds_every_number_and_reads_again(made: Reported, tmp_path: Path) -> None:
    values = json.loads(made.write(tmp_path / "report.json").read_text())
    assert set(values) == {"routing", "results", "counterfactuals", "retention"}
    assert from_dict(RoutingSummary, values["routing"]).header.domains == DOMAINS


def test_terminal_shows_markup_as_text(made: Reported) -> None:
    out = StringIO()
    Console(file=out, width=140).print(made.to_rich())
    assert "Experts specialise strongly by domain" in out.getvalue()
    assert "<b>code</b>" in out.getvalue()
    assert "Methods and caveats" in out.getvalue()


def test_cards_are_escaped_and_run_nothing(made: Reported) -> None:
    card = made._repr_html_()
    assert "Experts specialise strongly by domain" in card and "78%" not in card
    assert "<b>" not in card and "<script" not in card
    hostile: list[Any] = [counterfactuals(DOMAINS), retention(DOMAINS), comparison(DOMAINS)]
    assert made.evidence is not None
    for result in (*hostile, made.evidence.summary):
        shown = result._repr_html_()
        assert shown.startswith("<div") and "<b>" not in shown and "<i>" not in shown
    table = next(made.document.tables)._repr_html_()
    assert table.startswith("<table>") and "<b>" not in table


def test_comparison_of_made_up_results(tmp_path: Path) -> None:
    made = Reported.of(comparison(DOMAINS))
    assert made.document.title == "Routes are partly the same: 60% of the experts are shared"
    page = made.write(tmp_path / "compare.html").read_text()
    assert "view-data" not in page and "&lt;i&gt;one" in page
    assert [figure.name for figure in made.document.figures] == [
        "overlap",
        "drift",
        "agreement",
        "gate-swap",
    ]


def test_a_trace_compared_with_itself(plant: Callable[..., Path], tmp_path: Path) -> None:
    trace = plant()
    out = report(trace, tmp_path / "compare.md", other=trace)
    assert out.read_text().startswith("# The same tokens go to the same experts\n")


def test_gates_exchanged_are_found_beside_the_trace(
    plant: Callable[..., Path], tmp_path: Path
) -> None:
    trace = plant(domains=DOMAINS)
    swap = comparison(DOMAINS).gate_swap
    assert swap is not None
    write_result(trace / "gate_swap.json", replace(swap, models=("a/tiny", "b/tiny")))
    made = Reported.compare(trace, trace)
    said = " ".join(made.document.findings)
    assert "loss changes by at most +3.300 [+3.280, +3.320] in prose" in said
    assert "gate-swap" in [figure.name for figure in made.document.figures]
    with pytest.raises(InputError, match="but they are those of one and two"):
        Reported.compare(trace, trace, replace(swap, models=("one", "two")))
    of_others = replace(swap, models=("tiny", "tiny"), first={"other": swap.first["prose"]})
    with pytest.raises(InputError, match="but it was on other"):
        Reported.compare(trace, trace, of_others)


def test_gates_exchanged_the_other_way_round_are_turned() -> None:
    found = comparison(DOMAINS)
    assert found.gate_swap is not None
    again = with_gate_swap(replace(found, gate_swap=None), found.gate_swap.reversed)
    assert again.gate_swap == found.gate_swap


def test_the_command_writes_only_what_is_asked_for(
    plant: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = plant(domains=DOMAINS)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    out, _ = moiety("report", trace, "--json")
    assert set(json.loads(out)) == {"routing", "results"}
    moiety("report", trace, "--terminal")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    _, log = moiety("report", trace, "--json", "--out", tmp_path / "r.csv")
    assert "r.csv" in log and (tmp_path / "r.csv").is_file()
    (tmp_path / "list.json").write_text("[1]")
    _, log = moiety("report", trace, "--results", tmp_path / "list.json", code=2)
    assert "mapping of measures, but it is list" in log
    _, log = moiety("report", trace, "--gate-swap", tmp_path / "r.csv", code=2)
    assert "two traces with --gate-swap" in log
    _, log = moiety("report", trace, trace, "--retention", tmp_path / "r.csv", code=2)
    assert "one trace with --retention" in log


def test_unknown_forms_are_refused(made: Reported, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"end in \.html"):
        made.write(tmp_path / "report.pdf")
    with pytest.raises(InputError, match="png or svg"):
        pictures.write_figures(list(made.document.figures), tmp_path, "gif")


def test_without_a_browser_the_error_says_what_to_install(
    made: Reported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="install Debian's chromium"):
        pictures.write_figures(list(made.document.figures), tmp_path)


@pytest.mark.skipif(pictures.find_browser() is None, reason="chromium is not on PATH")
def test_every_figure_becomes_a_picture(made: Reported, tmp_path: Path) -> None:
    figures: list[Any] = list(made.document.figures)
    for kind, head in (("svg", b"<svg"), ("png", b"\x89PNG")):
        paths = pictures.write_figures(figures[-4:], tmp_path / kind, kind)
        assert [path.stem for path in paths] == [figure.name for figure in figures[-4:]]
        assert all(path.read_bytes().startswith(head) for path in paths)
