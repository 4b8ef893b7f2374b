"""Tables say what results hold, and no more."""

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from moiety.analysis.headline import findings, key_figures, verdict
from moiety.analysis.reporting.arguments import token_identity
from moiety.analysis.statistics import summarise
from moiety.analysis.tables import (
    ABSENT,
    Table,
    controls_table,
    layer_table,
    resources_table,
    routing_table,
    size,
)
from moiety.analysis.trace.file import Trace
from moiety.analysis.visible import visible, visible_line
from moiety.errors import InputError

RESULTS: dict[str, Any] = {
    "context_length": 256,
    "domains": ["code", "law"],
    "loss": {
        "oracle": {"code": 1.0, "law": 2.0},
        "uniform": {"code": 2.0, "law": 3.0},
        "composite": {"code": 1.25, "law": 2.25},
        "expert": {"code": 1.5},
        "new_merge": {"code": 1.0, "law": float("nan")},
    },
    "accuracy": {"arithmetic": {"base": 0.25, "composite": 0.5}},
    "bytes": {"dense_composite": 2_000_000_000, "composite": 1_100_000_000},
    "tokens_per_second": {"composite": {"prefill": 1234.5, "decode": 20}, "base": {"decode": 9}},
    "device": "a machine",
}


def test_controls_are_named_ordered_and_averaged_honestly() -> None:
    table = controls_table(RESULTS)
    assert table.columns == ("model and route", "code", "law", "mean")
    assert table.rows == (
        ("each sparse expert, own domain", "1.500", ABSENT, ABSENT),
        ("composite, learned router", "1.250", "2.250", "1.750"),
        ("composite, uniform route", "2.000", "3.000", "2.500"),
        ("composite, oracle route (own-domain expert)", "1.000", "2.000", "1.500"),
        ("new merge", "1.000", ABSENT, ABSENT),
    )
    assert "256" in table.note


def test_a_merge_has_no_router() -> None:
    merge = {"loss": {"composite": {"code": 1.25}, "composite_dense": {"code": 1.0}}}
    names = [row[0] for row in controls_table({**RESULTS, **merge}).rows]
    assert names == ["the same merge, unpruned", "merge"]


def test_accuracy_turns_tasks_into_columns() -> None:
    table = controls_table(RESULTS, "accuracy")
    assert table.columns == ("model and route", "arithmetic")
    assert table.rows[0] == ("base (dense)", "25.0%")


def test_resources_pair_bytes_with_speed() -> None:
    rows = resources_table(RESULTS).rows
    assert rows[0] == ("composite of dense experts", "2 GB", ABSENT, ABSENT, ABSENT)
    assert rows[1] == ("composite, sparse experts", "1.1 GB", "55%", "1,234", "20.0")
    assert rows[2] == ("base (dense)", ABSENT, ABSENT, ABSENT, "9.0")


def test_absent_parts_give_empty_tables() -> None:
    assert controls_table({}).rows == ()
    assert resources_table({}).rows == ()


@pytest.mark.parametrize(
    "wrong",
    [{"loss": 3}, {"loss": {"base": {"law": "x"}}}, {"loss": {"base": {"law": True}}}],
)
def test_wrong_results_are_refused_by_name(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"results: loss"):
        controls_table(wrong)
    with pytest.raises(InputError, match="measure must be"):
        controls_table({}, "charm")


def test_terminal_tables_show_markup_as_text() -> None:
    table = Table(title="t", columns=("a",), rows=(("[red]x\x1b[31m",),))
    out = StringIO()
    Console(file=out, width=60).print(table.to_rich())
    assert "[red]x␛[31m" in out.getvalue()


def test_sizes() -> None:
    assert [size(n) for n in (12, 1500, 2.5e6, 1.234e9)] == ["12 B", "1.5 kB", "2.5 MB", "1.23 GB"]


def test_hidden_characters_become_visible() -> None:
    assert visible("a\0b\N{RIGHT-TO-LEFT OVERRIDE}\n") == "a␀b⟨U+202E⟩\n"
    assert visible_line("a\nb\x7f") == "a␊b␡"
    assert visible("👩‍👧 漢字 é") == "👩‍👧 漢字 é"


def test_routing_tables_of_a_planted_trace(plant: Any) -> None:
    summary = summarise(Trace.open(plant()))
    first = routing_table(summary).rows[0]
    assert first[:3] == ("arithmetic", "6", "120")
    assert first[4:] == ("arithmetic (75%)", "100.0%")
    assert layer_table(summary).rows[0][:5] == (
        "0",
        "1.000",
        *layer_table(summary).rows[0][2:4],
        "100.0%",
    )


def test_headline_says_what_the_numbers_say(plant: Any) -> None:
    summary = summarise(Trace.open(plant()))
    assert verdict(summary) == "Experts specialise strongly by domain"
    text = " ".join(findings(summary, RESULTS))
    assert "p = 0.001" in text
    assert "75% of the gap" in text
    assert "55% of the 2 GB" in text
    assert [value for value, _ in key_figures(summary, RESULTS)] == ["1.00", "100%", "1.750", "55%"]


def test_headline_admits_no_evidence(plant: Any) -> None:
    summary = summarise(Trace.open(plant(purity=0.0)))
    assert verdict(summary).startswith("No evidence")


def test_headline_does_not_sell_significance_as_size(plant: Any) -> None:
    summary = summarise(Trace.open(plant(purity=0.0)))
    tiny = replace(
        summary.nmi.overall, observed=0.0005, corrected=0.0003, mean=0.0002, p_value=0.001
    )
    told = replace(summary, nmi=replace(summary.nmi, overall=tiny))
    assert verdict(told).endswith("what exceeds chance is negligible")
    text = " ".join(findings(told, {}))
    assert "0.00050" in text and "(p = 0.001)" in text and "most in layer" not in text
    assert token_identity(told) == ""
    weak = replace(tiny, observed=0.02)
    told = replace(summary, nmi=replace(summary.nmi, overall=weak))
    assert "weakly by" in verdict(told)


def test_headline_does_not_sell_vocabulary_as_domain(plant: Any) -> None:
    summary = summarise(Trace.open(plant()))
    conditional = replace(summary.vocabulary.conditional, p_value=0.4)
    told = replace(summary, vocabulary=replace(summary.vocabulary, conditional=conditional))
    assert verdict(told) == (
        "Experts specialise strongly by vocabulary; no more of the domain is shown"
    )


def test_headline_admits_too_few_documents(plant: Any) -> None:
    summary = summarise(Trace.open(plant(documents=1)))
    assert verdict(summary).startswith("Too few documents")


def test_headline_of_one_domain(plant: Any) -> None:
    summary = summarise(Trace.open(plant(domains=("law",), active=1)))
    assert verdict(summary).startswith("One domain only")
    assert "mutual" not in " ".join(findings(summary, {}))


@pytest.mark.parametrize(
    ("learned", "said"),
    [(2.6, "worse than equal weights"), (0.9, "better than the oracle")],
)
def test_headline_does_not_flatter_the_router(plant: Any, learned: float, said: str) -> None:
    summary = summarise(Trace.open(plant()))
    losses = {"composite": {"a": learned}, "oracle": {"a": 1.0}, "uniform": {"a": 2.0}}
    assert said in " ".join(findings(summary, {"loss": losses}))
